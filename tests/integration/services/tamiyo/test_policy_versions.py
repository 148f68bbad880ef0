"""Policy versions on the real log, Postgres and S3: from the command line to decisions, under load."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.conditions import wait_until_async
from support.data.rebuild_runs import esper
from support.events.tamiyo_run_events import boundary_reached, epoch_completed, run_started
from support.processes.esper_processes import WORKER, process, running

from esper.config import Settings
from esper.embedded.processes import ChildProcess
from esper.embedded.stack import EmbeddedStack
from esper.graph.graph_view import GraphView
from esper.oona.log_reader import follow
from esper.oona.producer import OonaProducer
from esper.schemas import events
from esper.schemas.events import Event
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import DECISIONS
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.decision_service import DecisionService
from esper.services.tamiyo.policies import ActionDistribution, Policy, point_mass
from esper.services.tamiyo.policies.policy_sources import WeightsSource, sources_by_kind
from esper.services.tamiyo.settings import TamiyoSettings
from esper.storage.blob_keys import BlobKind
from esper.storage.blobs import BlobStore
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.blob_references import referenced_blobs
from esper.streams.read_models.policy_versions import PolicyVersion, active_policy, trained_versions

pytestmark = pytest.mark.slow

NUM_RUNS, NUM_BOUNDARIES, EVERY = 6, 24, 4
VERSIONS, MISSING = (11, 12), 13  # those that take turns, and one whose weights are missing


def worker_of(settings: Settings, log: EmbeddedStack, folder: Path) -> ChildProcess:
    dsn = settings.need_postgres().dsn.get_secret_value()
    return process(log, folder, "worker", *WORKER, ESPER_POSTGRES__DSN=dsn)


async def send_events(settings: Settings, *sent: Event) -> None:
    async with OonaProducer(settings.need_kafka()) as producer:
        for event in sent:
            event_id = event.activation_id if isinstance(event, events.PolicyActivated) else uuid.uuid4()
            await producer.send(OonaMessage.of(event, id=event_id, source="test"))


def trained(version: int, sha256: str, size: int, kind: str = "constant") -> events.PolicyTrained:
    return events.PolicyTrained(
        policy_id=kind, policy_version=version, kind=kind, parent_version=version - 1 or None, weights_sha256=sha256,
        weights_size_bytes=size, num_decisions=200, figures={"loss": 0.25}, parameters={"width": 8},
    )  # fmt: skip


def evaluated(version: int, verdict: str, against: tuple[str, int]) -> events.PolicyEvaluated:
    return events.PolicyEvaluated(
        policy_id="constant", policy_version=version, against_policy_id=against[0], against_version=against[1],
        estimator="doubly_robust", estimate=0.5, low=0.25, high=0.75, confidence=0.95, effective_sample_size=40.0,
        num_decisions=200, held_out_runs=("run-1",), verdict=verdict, reason="by the interval",
    )  # fmt: skip


def activated(version: int) -> events.PolicyActivated:
    return events.PolicyActivated(
        policy_id="constant", policy_version=version, kind="constant", activation_id=uuid.uuid4(), reason="test"
    )


@asynccontextmanager
async def projections(settings: Settings) -> AsyncIterator[Any]:
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        yield connection


async def test_activation_and_rollback_from_the_command_line(
    mine: Settings, log: EmbeddedStack, tmp_path: Path
) -> None:
    sha256 = "ad" * 32
    await send_events(mine, trained(1, sha256, 5), trained(1, "ff" * 32, 9), trained(2, sha256, 5))
    with running(worker_of(mine, log, tmp_path), "worker.ready"):
        async with projections(mine) as connection:

            async def are_known() -> bool:
                return len(await trained_versions(connection)) == 2

            await wait_until_async(are_known, 40, "the trainings' rows")
            assert (BlobKind.POLICY, sha256) in await referenced_blobs(connection)
            code, printed = await esper(mine, "tamiyo", "activate", "heuristic", "1", "--reason", "first", "--force")
            assert (code, "heuristic v1 decides now" in printed) == (0, True), printed
            code, printed = await esper(mine, "tamiyo", "activate", "constant", "1", "--reason", "I like it")
            assert code == 1
            assert "constant v1 was not evaluated against heuristic v1, which is active; --force" in printed
            await send_events(
                mine, evaluated(1, "better", ("heuristic", 1)), evaluated(2, "not_better", ("constant", 1))
            )

            async def is_activated() -> bool:
                code, _printed = await esper(mine, "tamiyo", "activate", "constant", "1", "--reason", "better")
                return code == 0

            await wait_until_async(is_activated, 30, "the evaluation's row")
            active = await active_policy(connection)
            assert active is not None
            assert (str(active.version), active.reason) == ("constant v1", "better")
            assert active.version.weights is not None
            assert active.version.weights.sha256 == sha256, "of two trainings under one version the first counts"
            assert active.version.parameters == {"width": 8}
            code, printed = await esper(mine, "tamiyo", "activate", "constant", "2", "--reason", "newer")
            assert (code, "constant v2 is not better than constant v1" in printed) == (1, True), printed
            code, printed = await esper(mine, "tamiyo", "activate", "constant", "2", "--reason", "newer", "--force")
            assert code == 0, printed
            active = await active_policy(connection)
            assert active is not None
            assert active.reason.startswith("newer (forced: constant v2 is not better")
            for back_to in ("constant v1", "heuristic v1"):
                code, printed = await esper(mine, "tamiyo", "rollback", "--reason", "worse")
                assert (code, f"{back_to} decides now" in printed) == (0, True), printed
            code, printed = await esper(mine, "tamiyo", "rollback", "--reason", "worse")
            assert (code, "heuristic v1 was the first active version" in printed) == (1, True), printed
            code, printed = await esper(mine, "tamiyo", "policies")
            assert code == 0
            assert "active: heuristic v1, since" in printed
            for shown in ("rolled back from constant v2", "(forced: ", "not_better", "loss 0.25", "40.0 of 200"):
                assert shown in printed, shown
        code, printed = await esper(mine, "projections", "rebuild", "--compare", "--quiet")
        assert code == 0, printed
        code, printed = await esper(mine, "projections", "verify", "--quiet")
        assert code == 0, printed
        code, printed = await esper(mine, "tamiyo", "policies")
        assert "active: heuristic v1, since" in printed, "the rebuilt rows name the same"


class Constant(Policy):
    """Always waits; its reason names the version, and it records the runs of each batch."""

    kind = "constant"

    def __init__(self, name: str, batches: list[tuple[str, tuple[str, ...]]]) -> None:
        self._name, self._batches = name, batches

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        return point_mass(0, self._name)

    def distributions(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[ActionDistribution]:
        self._batches.append((self._name, tuple(v.run_id for v in views)))
        return super().distributions(views, choices_per_view)


class Decided:
    """Follows the decisions in the log: the first one by run and boundary."""

    def __init__(self, settings: Settings, run_ids: Sequence[str]) -> None:
        self.first: dict[tuple[str, int], events.DecisionMade] = {}
        self._settings, self._run_ids, self._moved = settings, set(run_ids), asyncio.Condition()

    async def follow(self) -> None:
        async with aclosing(follow(self._settings.need_kafka(), DECISIONS, start={})) as records:
            async for record in records:
                event = record.decode().data
                if isinstance(event, events.DecisionMade) and event.run_id in self._run_ids:
                    async with self._moved:
                        self.first.setdefault((event.run_id, event.boundary), event)
                        self._moved.notify_all()

    async def wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(60), self._moved:
                await self._moved.wait_for(is_so)
        except TimeoutError as error:
            raise AssertionError(f"{what} did not come: {len(self.first)} decisions") from error


async def train(run_id: str, decided: Decided, producer: OonaProducer, begun: list[int]) -> None:
    """A run that reaches its next boundary as soon as the last one is decided."""
    await producer.send_batch([run_started(run_id), epoch_completed(run_id, 1)])
    for number in range(1, NUM_BOUNDARIES + 1):
        begun[0] += 1
        await producer.send(boundary_reached(run_id, number + 1, number))
        await decided.wait_for(lambda number=number: (run_id, number) in decided.first, f"{run_id} {number}")


async def roll(settings: Settings, begun: list[int], num_all: int) -> int:
    """Activate the two versions in turn while the runs progress."""
    num_rolls = 0
    while begun[0] < num_all:
        wanted = begun[0] + EVERY * NUM_RUNS // 2
        await send_events(settings, activated(VERSIONS[num_rolls % 2]))
        num_rolls += 1

        async def has_progressed(wanted: int = wanted) -> bool:
            return begun[0] >= min(wanted, num_all)

        await wait_until_async(has_progressed, 60, "progress of the runs")
    return num_rolls


@pytest.mark.timeout(300)
async def test_swaps_under_load_leave_no_boundary_undecided(mine: Settings, log: EmbeddedStack, tmp_path: Path) -> None:
    run_ids = [f"roll-{n}-{uuid.uuid4().hex[:8]}" for n in range(NUM_RUNS)]
    batches: list[tuple[str, tuple[str, ...]]] = []
    tamiyo = TamiyoSettings.model_validate({"policy": "active", "stale_after_s": 60.0, "poll_s": 0.02})

    def build(data: bytes, version: PolicyVersion) -> Policy:
        return Constant(f"{json.loads(data)['name']} as {version}", batches)

    by_kind = {**sources_by_kind(mine, tamiyo), "constant": WeightsSource(mine, build)}
    async with BlobStore(mine.need_s3()) as blobs:
        for number in VERSIONS:
            data = json.dumps({"name": f"blob {number}"}).encode()
            digest = await blobs.put(data, kind=BlobKind.POLICY)
            await send_events(mine, trained(number, digest, len(data)))
    await send_events(mine, trained(MISSING, "00" * 32, 10))
    decided, begun = Decided(mine, run_ids), [0]
    with running(worker_of(mine, log, tmp_path), "worker.ready"):
        async with (
            OonaProducer(mine.need_kafka()) as producer,
            DecisionService(mine, tamiyo, by_kind) as one,
            DecisionService(mine, tamiyo, by_kind) as other,
        ):
            running_tasks = [asyncio.create_task(c) for c in (one.run(), other.run(), decided.follow())]
            rolling = asyncio.create_task(roll(mine, begun, NUM_RUNS * NUM_BOUNDARIES))
            async with asyncio.TaskGroup() as group:
                for run_id in run_ids:
                    group.create_task(train(run_id, decided, producer, begun))
            num_rolls = await rolling
            await send_events(mine, activated(MISSING))

            async def is_reported() -> bool:
                reasons = [p.reason for s in (one, other) for p in s.metrics.health.problems()]
                return (
                    sum(f"constant v{MISSING}, which the log names as active, cannot be loaded" in r for r in reasons)
                    == 2
                )

            await wait_until_async(is_reported, 30, "the missing weights")
            last = NUM_BOUNDARIES + 1
            await producer.send_batch([boundary_reached(run_id, last + 1, last) for run_id in run_ids])
            await decided.wait_for(lambda: all((r, last) in decided.first for r in run_ids), "the last boundaries")
            metrics = [s.metrics.meter.registry for s in (one, other)]
            broken = [registry.get_sample_value("esper_tamiyo_decision_failures_total", {"step": w})
                      for registry in metrics for w in ("policy", "view", "record")]  # fmt: skip
            for task in running_tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*running_tasks)
    assert broken == [None] * 6
    assert num_rolls >= 4
    assert len(decided.first) == NUM_RUNS * last
    assert not any(d.stale or "failed" in d.reason for d in decided.first.values())
    acted = [d for d in decided.first.values() if d.policy_id == "constant"]
    by_version = {d.policy_version: d for d in acted}
    assert set(by_version) == set(VERSIONS), "both decided, and the one that cannot be loaded never did"
    for decision in acted:
        number = decision.policy_version
        assert decision.reason == f"blob {number} as constant v{number}", "the decision names the policy that made it"
    assert any(len(run_ids) > 1 for _name, run_ids in batches), "some boundaries were decided in one batch"
