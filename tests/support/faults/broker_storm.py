"""A broker behind a proxy with a writer and readers, and the faults that are injected into them."""

import random
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.conditions import wait_until
from support.faults.numbers_reader import Ledger
from support.faults.numbers_writer import NEXT
from support.paths import FAULT_SCRIPTS
from support.proxies.tcp_proxy import FaultProxy

from esper.config import KafkaSettings
from esper.connection.settings import OUTBOX_FILE
from esper.embedded.kafka import EmbeddedKafka
from esper.embedded.processes import ChildProcess, free_port
from esper.embedded.stack import inherited_environment
from esper.schemas.topics import RUNS

RUN, GROUP = "numbers", "ledger"
PER_SECOND = 200.0
RECOVERY_S = 30.0  # the limit of the requirements
FAULT_S = 3.0  # duration of a slow, half-closed or stalled connection


@dataclass(frozen=True, slots=True)
class Recovery:
    """One round: the injected fault, and the seconds until a number recorded by then was applied."""

    fault: str
    seconds: float


class Storm:
    """Processes that run from ``begin`` to ``settle``; ``storm`` creates them."""

    def __init__(self, folder: Path, kafka: EmbeddedKafka, proxy: FaultProxy, rng: random.Random) -> None:
        self.folder, self.kafka, self.proxy, self.rng = folder, kafka, proxy, rng
        self.settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{proxy.port}")
        self.writer = self._process("writer", "numbers_writer.py", RUN, str(folder / "run"), str(PER_SECOND))
        self.readers = [self.reader(0)]
        self.faults: dict[str, Callable[[], None]] = {
            "writer killed": lambda: self._kill_and_restart(self.writer),
            "reader killed": lambda: self._kill_and_restart(self.readers[0]),
            "broker killed": self._restart_broker,
            "connections cut": self.proxy.cut,
            "connections slow": lambda: self._apply_temporarily(lambda: self.proxy.slow(200_000)),
            "half closed": lambda: self._apply_temporarily(self.proxy.half_close),
            "network stalled": lambda: self._apply_temporarily(self.proxy.stall),
            "broker killed in a rebalance": self._restart_broker_in_rebalance,
        }

    def reader(self, number: int) -> ChildProcess:
        """A member of the consumer group; all members share one ledger."""
        database = str(self.folder / "ledger.sqlite")
        return self._process(f"reader-{number}", "numbers_reader.py", GROUP, str(number), database)

    def begin(self) -> None:
        """Start all processes and wait until numbers are applied."""
        Ledger(self.folder / "ledger.sqlite").close()
        self.writer.start()
        self.readers[0].start()
        wait_until(lambda: self.applied() > 0, 60, "the first number")

    def round(self, fault: str) -> Recovery:
        """Inject a fault at a random moment and wait until numbers are applied again."""
        time.sleep(self.rng.uniform(0, 1))
        self.faults[fault]()
        healed = time.monotonic()
        num_recorded = self.recorded()
        wait_until(lambda: self.applied() > num_recorded, 120, f"numbers after: {fault}\n{self.logs()}")
        return Recovery(fault, time.monotonic() - healed)

    def settle(self) -> int:
        """Stop the writer and wait for the reader. Returns how many numbers were recorded."""
        self.writer.stop(90)
        assert self.writer.returncode == 0, self.writer.tail()
        total = self.recorded()
        wait_until(lambda: self.applied() >= total, 60, f"all {total} numbers\n{self.logs()}")
        for reader in self.readers:
            reader.stop(30)
            assert reader.returncode == 0, reader.tail()
        return total

    def check(self, total: int) -> None:
        """Check that every number was applied once and in order. Telemetry may be lost in memory, but not applied twice."""
        numbers = [n for (n,) in self._ledger("SELECT number FROM applied WHERE topic = ? ORDER BY id", RUNS.name)]
        assert numbers == list(range(total)), "lost, duplicated or out of order"
        twice = self._ledger(
            "SELECT 1 FROM applied WHERE topic <> ? GROUP BY run, number HAVING count(*) > 1", RUNS.name
        )
        assert twice == [], "telemetry applied twice"

    def recorded(self) -> int:
        """How many numbers were ever written to the outbox."""
        path = self.folder / "run" / OUTBOX_FILE
        if not path.exists():
            return 0
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20)) as database:
            found = database.execute("SELECT value FROM marks WHERE name = ?", (NEXT,)).fetchone()
        return int(found[0]) if found else 0

    def applied(self) -> int:
        """How many numbers the reader has applied."""
        return int(self._ledger("SELECT count(*) FROM applied WHERE topic = ?", RUNS.name)[0][0])

    def logs(self) -> str:
        """The last lines of all logs."""
        return "\n".join(f"{p.name}:\n{p.tail(30)}" for p in (self.writer, *self.readers) if p.log_path.exists())

    def stop(self) -> None:
        """Kill every process."""
        for process in (self.writer, *self.readers):
            process.kill()
        self.kafka.kill()

    def _process(self, name: str, script: str, *arguments: str) -> ChildProcess:
        env = {
            **inherited_environment(),
            "ESPER_KAFKA__BOOTSTRAP_SERVERS": self.settings.bootstrap_servers,
            "ESPER_STATE_DIR": str(self.folder),
        }
        command = [sys.executable, str(FAULT_SCRIPTS / script), *arguments]
        return ChildProcess(name, command, env=env, log_path=self.folder / f"{name}.log", cwd=self.folder)

    def _ledger(self, query: str, *arguments: object) -> list[tuple[int, ...]]:
        with closing(sqlite3.connect(self.folder / "ledger.sqlite", timeout=20)) as database:
            return database.execute(query, arguments).fetchall()

    def _kill_and_restart(self, victim: ChildProcess) -> None:
        victim.kill()
        victim.start()

    def _restart_broker(self) -> None:
        self.kafka.kill()
        self.kafka.start()

    def _apply_temporarily(self, fault: Callable[[], None]) -> None:
        fault()
        time.sleep(FAULT_S)
        self.proxy.heal()

    def _restart_broker_in_rebalance(self) -> None:
        if len(self.readers) == 1:
            self.readers.append(self.reader(1))
            self.readers[1].start()
        else:
            self.readers.pop().stop(30)
        time.sleep(self.rng.uniform(0.5, 2.5))  # at a random point of the rebalance
        self._restart_broker()


@contextmanager
def storm(folder: Path, rng: random.Random) -> Iterator[Storm]:
    """A storm with a new broker that clients can only reach through the proxy."""
    import asyncio

    from esper.oona.admin.topics import apply_topics

    broker_port, proxy_port = free_port(), free_port()
    kafka = EmbeddedKafka(folder / "kafka", port=broker_port)
    properties = kafka.default_properties()
    advertised = f"advertised.listeners=PLAINTEXT://127.0.0.1:{broker_port}"
    assert advertised in properties
    kafka._properties = properties.replace(advertised, advertised.replace(str(broker_port), str(proxy_port)))
    with FaultProxy(proxy_port, broker_port) as proxy:
        kafka.start()
        stage = Storm(folder, kafka, proxy, rng)
        try:
            asyncio.run(apply_topics(stage.settings))
            yield stage
        finally:
            stage.stop()
