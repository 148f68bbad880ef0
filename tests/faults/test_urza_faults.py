"""Faults while blueprints are certified and kernels built: each reaches its final status, with its bytes in S3."""

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from support.conditions import wait_until
from support.processes.esper_processes import SCRIPTS, cli, log_of, process, running, worker

from esper.embedded.processes import ChildProcess
from esper.embedded.stack import EmbeddedStack
from esper.kasmina.catalogue import MAX_KERNEL_BYTES
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.assets import LayerNode
from esper.schemas.messages import OonaMessage
from esper.services.urza.kernels.shipped_blueprints import SHIPPED
from esper.storage.blobs import BlobStore

BLUEPRINTS, WIDTHS = 3, 5  # per round
NARROWEST = 8  # every shipped module can be built at this width
OUTAGE_S = (0.0, 3.0)
BEGINS_S = (0.0, 2.0)  # after the round's requests
RECOVERY_S = 120.0
MIN_ROUNDS, MAX_ROUNDS = 6, 18  # a round takes up to 20 s
LIFECYCLE = ["propose", "compile", "certify"]


class Stage:
    """A stack, a worker and Urza, each of which can be killed."""

    def __init__(self, stack: EmbeddedStack, folder: Path, exits: ExitStack) -> None:
        self.stack, self.folder, self.exits = stack, folder, exits
        self.num_blueprints = self.num_widths = 0
        self.worker = self.urza = self._begin("worker")
        self.urza = self._begin("urza")
        self.faults: dict[str, Callable[[float], None]] = {
            "broker": lambda outage_s: self._cut(stack.kafka, outage_s),
            "Postgres": lambda outage_s: self._cut(stack.postgres, outage_s),
            "S3": lambda outage_s: self._cut(stack.s3, outage_s),
            "worker": lambda _away_s: self._replace("worker"),
            "Urza": lambda _away_s: self._replace("urza"),
            "sandbox": lambda _away_s: self._kill_sandbox(),
        }

    def _begin(self, name: str) -> ChildProcess:
        unique_name = f"{name}-{uuid.uuid4().hex[:6]}"
        if name == "worker":
            child, line = worker(self.stack, self.folder, unique_name), "worker.ready"
        else:
            child, line = (
                process(self.stack, self.folder, unique_name, str(SCRIPTS / "esper"), "serve", "urza"),
                "urza.ready",
            )
        return self.exits.enter_context(running(child, line))

    def _replace(self, name: str) -> None:
        getattr(self, name).kill()
        setattr(self, name, self._begin(name))

    def _cut(self, part: Any, outage_s: float) -> None:
        part.kill()
        time.sleep(outage_s)
        part.start()

    def _kill_sandbox(self) -> None:
        for child in psutil.Process(self.urza.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def request(self) -> None:
        """Propose new blueprints, and start a run whose layers have new widths."""
        rng = random.Random(self.num_blueprints)
        proposals = [
            OonaMessage.of(
                events.BlueprintChangeRequested(
                    blueprint_id=f"round-{self.num_blueprints + n}",
                    change="propose",
                    expected_version=0,
                    spec=rng.choice(list(SHIPPED.values())),
                ),
                id=uuid.uuid4(),
                source="test",
            )
            for n in range(BLUEPRINTS)
        ]
        run_id = f"run-{self.num_widths}"
        layers = tuple(
            LayerNode(layer_id=f"fc{n}", kind="linear", num_features=n, num_parameters=n, num_seeds=1)
            for n in range(NARROWEST + self.num_widths, NARROWEST + self.num_widths + WIDTHS)
        )
        started = events.RunStarted(
            run_id=run_id, incarnation=1, sequence=0, step=0, model="N", layers=layers, edges=(), boundary_steps=5,
            command_offset=0,
        )  # fmt: skip

        async def send() -> None:
            async with OonaProducer(self.stack.settings().need_kafka(), client_id="test") as producer:
                await producer.send_batch(proposals)
                await producer.send(OonaMessage.of(started, id=ids.trainer_event_id(run_id, 1, 0), source="test"))

        asyncio.run(send())
        self.num_blueprints += BLUEPRINTS
        self.num_widths += WIDTHS

    def rows(self, sql: str) -> list[Any]:
        """Rows of a query; none while Postgres is away."""

        async def read() -> list[Any]:
            connection = await asyncpg.connect(self.stack.postgres.dsn, timeout=5)
            try:
                return list(await connection.fetch(sql, timeout=10))
            finally:
                await connection.close()

        try:
            return asyncio.run(read())
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return []

    @property
    def is_complete(self) -> bool:
        """Whether every blueprint is certified and has a kernel for every width."""
        certified = self.rows("SELECT spec FROM esper.blueprints WHERE status = 'certified'")
        if len(certified) < len(SHIPPED) + self.num_blueprints:
            return False
        counted = self.rows("SELECT count(DISTINCT (blueprint_id, num_features)) AS n FROM esper.kernels")
        linear = sum('"linear"' in row["spec"] for row in certified)
        return bool(counted) and counted[0]["n"] == linear * self.num_widths

    async def count_stored(self) -> int:
        """Number of kernels in the tables, after a check that each is intact in S3."""
        rows = await asyncio.to_thread(self.rows, "SELECT kernel_sha256 FROM esper.kernels")
        async with AsyncExitStack() as exits:
            blobs = await exits.enter_async_context(BlobStore(self.stack.settings().need_s3()))
            for row in rows:
                await blobs.get(row["kernel_sha256"], max_bytes=MAX_KERNEL_BYTES)
        return len(rows)


@pytest.mark.timeout(3600)
def test_blueprints_reach_final_status_in_storm(
    fresh_stack: EmbeddedStack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    num_rounds, seed = request.config.getoption("--fault-rounds"), request.config.getoption("--fault-seed")
    if num_rounds < MIN_ROUNDS:
        pytest.skip(f"slow: run make faults with ROUNDS={MIN_ROUNDS} or more")
    rng, bag = random.Random(seed), list[str]()
    with ExitStack() as exits:
        stage = Stage(fresh_stack, tmp_path, exits)
        for number in range(min(num_rounds, MAX_ROUNDS)):
            bag = bag or rng.sample(list(stage.faults), len(stage.faults))
            fault = bag.pop()
            stage.request()
            time.sleep(rng.uniform(*BEGINS_S))
            stage.faults[fault](rng.uniform(*OUTAGE_S))
            begin = time.monotonic()
            wait_until(lambda: stage.is_complete, RECOVERY_S, f"everything, after {fault} of seed {seed}")
            print(f"{number + 1:>3} {fault:<10} {time.monotonic() - begin:5.1f} s", flush=True)
        lifecycles = stage.rows(
            "SELECT array_agg(change ORDER BY log_offset) AS life FROM esper.blueprint_changes "
            "WHERE verdict = 'accepted' GROUP BY blueprint_id"
        )
        assert [row["life"] for row in lifecycles] == [LIFECYCLE] * (len(SHIPPED) + stage.num_blueprints)
        assert asyncio.run(stage.count_stored()) > 0
        assert "urza.failed" not in log_of(stage.urza)
        code, printed = cli(fresh_stack, tmp_path, "projections", "verify")
        assert code == 0, printed
