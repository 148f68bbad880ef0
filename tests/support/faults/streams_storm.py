"""Real workers on a real log, and the faults that are injected into them, Postgres and the broker.

After each fault every record must be projected, and the rows must equal those of a replay from offset zero. Workers
reach Postgres through a proxy, the check does not.
"""

import asyncio
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from support.conditions import wait_until
from support.faults.log_writer import LogWriter
from support.processes.esper_processes import log_of, worker
from support.proxies.tcp_proxy import FaultProxy

from esper.embedded.processes import ChildProcess, free_port
from esper.embedded.stack import EmbeddedStack
from esper.oona.producer import OonaProducer
from esper.streams.database.connections import connect
from esper.streams.read_models.projection_status import topic_lags
from esper.streams.replay import rebuild, verify

KILL_WITHIN_S = 2.0  # after some progress
ABORTED = "with an open transaction"
SESSION_S = 6.0  # the minimum of a broker
FAULT_S = 3.0  # duration of a fault that heals
READY_S, RECOVERY_S = 90.0, 120.0
READY = "worker.ready"
PARTITION_STOPPED, REFUSED = "partition.stopped", "worker.refused"


@dataclass(frozen=True, slots=True)
class Recovery:
    """One round: the injected fault, and the seconds until every record written before was projected."""

    fault: str
    seconds: float
    num_written: int


class StreamsStorm:
    """A stack, a writer and workers; ``streams_storm`` creates them."""

    def __init__(self, stack: EmbeddedStack, folder: Path, rng: random.Random) -> None:
        self.stack, self.folder, self.rng = stack, folder, rng
        self.settings = stack.settings()
        self.writer = LogWriter(self.settings.need_kafka(), random.Random(rng.random()))
        self.proxy = FaultProxy(free_port(), stack.postgres.port)
        self.workers: list[ChildProcess] = []
        self._num_started = 0
        self.faults: dict[str, Callable[[], None]] = {
            "worker killed": self._replace_worker,
            "worker joins, worker leaves": self._overlap_rebalances,
            "worker stopped past its session": self._suspend_worker,
            "Postgres killed": self._restart_postgres,
            "Postgres slow": lambda: self._apply_temporarily(lambda: self.proxy.slow(20_000)),
            "Postgres stalled": lambda: self._apply_temporarily(self.proxy.stall),
            "Postgres connections cut": self.proxy.cut,
            "backends terminated": lambda: self._sql(TERMINATE),
            "Postgres read-only": lambda: self._with_option("default_transaction_read_only = on"),
            "statements time out": lambda: self._with_option("statement_timeout = '1ms'"),
            "too many connections": self._too_many_connections,
            "disk full, as Postgres reports it": self._disk_full,
            "table locked": self._table_locked,
            "deadlock": self._deadlock,
            "broker killed": self._restart_broker,
            "broker silent": self._suspend_broker,
            "rebuild swapped in": lambda: print(
                f"    rebuilt from {asyncio.run(rebuild(self.settings)).num_records:,} records"
            ),
            "many undecodable records in a batch": self._undecodable_records,
        }

    def begin(self, num_workers: int = 2) -> None:
        """Start the workers."""
        for _ in range(num_workers):
            self.start_worker()
        wait_until(lambda: all(READY in log_of(w) for w in self.workers), READY_S, "the workers")

    def start_worker(self) -> ChildProcess:
        """Start another worker, which is not ready yet."""
        self._num_started += 1
        env = {
            "ESPER_POSTGRES__DSN": self.stack.postgres.dsn.replace(str(self.stack.postgres.port), str(self.proxy.port)),
            "ESPER_STREAMS__SESSION_TIMEOUT_S": str(SESSION_S),
            "ESPER_STREAMS__MAX_BATCH_RECORDS": "200",
            "ESPER_STREAMS__RETRY_MAX_DELAY_S": "1",
            "ESPER_STREAMS__STALLED_AFTER_S": "2",
        }
        started = worker(self.stack, self.folder, f"worker-{self._num_started}", **env)
        started.start()
        self.workers.append(started)
        return started

    def round(self, fault: str) -> Recovery:
        """Inject a fault at a random moment while the writer writes, wait for the projection, and check the rows."""
        before = self.writer.num_written
        time.sleep(self.rng.uniform(0, 1))
        self.faults[fault]()
        seconds = self.settle(fault)
        return Recovery(fault, seconds, self.writer.num_written - before)

    def settle(self, after: str) -> float:
        """Wait until every record is projected, and check the rows. Returns the seconds that the projection took."""
        begin_s = time.monotonic()
        self.writer.pause()
        self._restart_refused()
        self.wait_until_projected(after)
        seconds = time.monotonic() - begin_s
        self.check_rows(after)
        self.writer.resume()
        return seconds

    def kill_amid_progress(self) -> None:
        """Kill a worker at a random moment after progress since the last kill, and start another."""
        before = self.num_projected()
        wait_until(lambda: self.num_projected() > before or self._has_failed(), RECOVERY_S, "some progress")
        assert not self.log_lines(PARTITION_STOPPED), self.logs()
        time.sleep(self.rng.uniform(0, KILL_WITHIN_S))
        self._replace_worker()

    def num_projected(self) -> int:
        """Records that are projected."""
        with psycopg.connect(self.stack.postgres.dsn) as connection:
            row = connection.execute("SELECT coalesce(sum(next_offset), 0) FROM esper.positions").fetchone()
        return int(row[0]) if row else 0

    def num_aborted(self) -> int:
        """Transactions so far whose worker disconnected; a worker may have several."""
        return self.stack.postgres.log_path.read_text(errors="replace").count(ABORTED)

    def wait_until_projected(self, after: str) -> None:
        """Wait until every record is projected and every worker is alive."""
        try:
            wait_until(lambda: self.lag() == 0 or self._has_failed(), RECOVERY_S, f"every record, after: {after}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def _has_failed(self) -> bool:
        return any(PARTITION_STOPPED in log_of(w) or not (w.is_alive or REFUSED in log_of(w)) for w in self.workers)

    def _restart_refused(self) -> None:
        """Restart the workers that refused to start during a fault, as a supervisor would."""
        while True:
            wait_until(lambda: all(READY in log_of(w) or not w.is_alive for w in self.workers), READY_S, "the workers")
            refused = [w for w in self.workers if not w.is_alive and REFUSED in log_of(w)]
            if not refused:
                return
            for child in refused:
                assert "Traceback" not in log_of(child), child.tail(40)
                self.workers.remove(child)
                self.start_worker()

    def check_rows(self, after: str) -> None:
        """Check that the rows equal a replay, every worker is alive and no partition is stopped."""
        for child in self.workers:
            assert child.is_alive, f"{child.name} exited after: {after}\n{child.tail(40)}"
            assert PARTITION_STOPPED not in log_of(child), (
                f"{child.name} stopped a partition after: {after}\n{child.tail(40)}"
            )
        different = [c.table for c in asyncio.run(verify(self.settings)) if not c.is_equal]
        assert different == [], f"rows differ from a replay after: {after}\n{self.logs()}"

    def shares(self) -> list[int]:
        """Number of partitions of each worker that is ready."""
        partitions = [re.findall(rf"{READY}.*partitions=(\d+)", log_of(w)) for w in self.workers]
        return [int(counts[-1]) for counts in partitions if counts]

    def logs(self) -> str:
        """The last lines of the workers' logs."""
        return "\n".join(f"{w.name} (alive: {w.is_alive}):\n{w.tail(25)}" for w in self.workers)

    def log_lines(self, word: str) -> list[str]:
        """The lines of the workers' logs that contain a word."""
        return [line for w in self.workers for line in log_of(w).splitlines() if word in line]

    def stop(self) -> None:
        """Kill every worker."""
        for child in self.workers:
            child.kill()

    def lag(self) -> int:
        """Records that are not projected yet."""

        async def total() -> int:
            connection = await connect(self.settings.need_postgres())
            try:
                await connection.execute("SET search_path = esper")
                return sum(t.lag for t in await topic_lags(connection, self.settings.need_kafka()) if t.lag is not None)
            finally:
                await connection.close()

        return asyncio.run(total())

    def _sql(self, *statements: str) -> None:
        with psycopg.connect(self.stack.postgres.dsn, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def _apply_temporarily(self, fault: Callable[[], None]) -> None:
        fault()
        time.sleep(FAULT_S)
        self.proxy.heal()

    def _replace_worker(self) -> None:
        self.workers.pop(self.rng.randrange(len(self.workers))).kill()
        self.start_worker()

    def _overlap_rebalances(self) -> None:
        """Stop a worker before a new one is ready, so that two rebalances overlap."""
        self.start_worker()
        time.sleep(self.rng.uniform(0, 6))
        leaving = self.workers.pop(self.rng.randrange(len(self.workers)))
        leaving.stop(30)

    def _suspend_worker(self) -> None:
        """Stop a worker for longer than its session, so that others have its partitions when it continues."""
        stale = self.rng.choice(self.workers)
        others = [w for w in self.workers if w is not stale] or [self.start_worker()]
        counts = {w.name: log_of(w).count(READY) for w in others}
        stale.send(signal.SIGSTOP)
        try:
            wait_until(
                lambda: any(log_of(w).count(READY) > counts[w.name] for w in others), READY_S, "others taking over"
            )
            time.sleep(self.rng.uniform(0, 1))
        finally:
            stale.send(signal.SIGCONT)

    def _restart_postgres(self) -> None:
        self.stack.postgres.kill()
        time.sleep(self.rng.uniform(0, FAULT_S))
        self.stack.postgres.start()

    def _with_option(self, option: str) -> None:
        """Set an option for new connections, and close all existing ones."""
        self._sql(f"ALTER ROLE esper SET {option}", TERMINATE)
        time.sleep(FAULT_S)
        with psycopg.connect(self.stack.postgres.dsn, autocommit=True, options=f"-c {HARMLESS}") as connection:
            connection.execute("ALTER ROLE esper RESET ALL")
            connection.execute(TERMINATE)

    def _too_many_connections(self) -> None:
        with ExitStack() as held, suppress(psycopg.OperationalError):
            self._sql(TERMINATE)
            deadline = time.monotonic() + FAULT_S
            while time.monotonic() < deadline:
                with suppress(psycopg.OperationalError):
                    while True:  # superusers may use the reserved connections too
                        held.enter_context(psycopg.connect(self.stack.postgres.dsn))
                time.sleep(0.1)

    def _disk_full(self) -> None:
        self._sql(DISK_FULL)
        time.sleep(FAULT_S)
        self._sql("DROP FUNCTION public.disk_full CASCADE")

    def _table_locked(self) -> None:
        with psycopg.connect(self.stack.postgres.dsn) as connection:
            connection.execute("LOCK TABLE esper.health_windows, esper.progress IN ACCESS EXCLUSIVE MODE")
            time.sleep(FAULT_S)

    def _deadlock(self) -> None:
        """Lock what a worker locks last first, and the reverse, until Postgres resolves a deadlock."""
        for _ in range(20):
            with suppress(psycopg.errors.DeadlockDetected), psycopg.connect(self.stack.postgres.dsn) as connection:
                connection.execute("LOCK TABLE esper.progress IN ACCESS EXCLUSIVE MODE")
                time.sleep(0.1)
                connection.execute("SELECT FROM esper.positions FOR UPDATE")
            if "deadlock detected" in self.stack.postgres.log_path.read_text(errors="replace"):
                return

    def _restart_broker(self) -> None:
        self.stack.kafka.kill()
        time.sleep(self.rng.uniform(0, FAULT_S))
        self.stack.kafka.start()

    def _suspend_broker(self) -> None:
        """Pause the broker for longer than a session."""
        self.stack.kafka.pause()
        time.sleep(self.rng.uniform(FAULT_S, 3 * SESSION_S))
        self.stack.kafka.resume()

    def _undecodable_records(self) -> None:
        async def send() -> None:
            async with OonaProducer(self.settings.need_kafka()) as producer:
                await producer.send_records(records)

        self.writer.pause()
        records = self.writer.batch(1_500, garbage=0.2)
        asyncio.run(send())
        self.writer.resume()


DISK_FULL = """
CREATE FUNCTION public.disk_full() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER disk_full BEFORE INSERT ON esper.progress EXECUTE FUNCTION public.disk_full()
"""
TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
HARMLESS = "statement_timeout=0 -c default_transaction_read_only=off"


@contextmanager
def streams_storm(stack: EmbeddedStack, folder: Path, rng: random.Random) -> Iterator[StreamsStorm]:
    """A storm on a stack that no other test uses."""
    stage = StreamsStorm(stack, folder, rng)
    with stage.proxy, stage.writer:
        try:
            yield stage
        finally:
            stage.stop()
