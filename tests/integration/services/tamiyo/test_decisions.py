"""Tamiyo on real projections: a decision for each boundary, its command even after a crash, WAIT without a view."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from support.conditions import wait_until_async
from support.data.certified_blueprints import certified_at_once
from support.events.run_messages import read_run_messages
from support.events.tamiyo_run_events import is_kernel_offered, trainer_message
from support.processes.esper_processes import running, worker

from esper.embedded.stack import EmbeddedStack
from esper.graph.graph_view import NO_HEALTH, GraphView, KernelView, LayerView, SeedView
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.assets import Kernel, LayerNode
from esper.schemas.enums import LayerKind, SeedStage
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import COMMANDS, DECISIONS, RUNS, TELEMETRY
from esper.services.tamiyo.control.decision_events import view_message
from esper.services.tamiyo.decision_service import DecisionService
from esper.services.tamiyo.settings import TamiyoSettings
from esper.streams.read_models.pending_boundaries import PendingBoundary

LAYER = LayerNode(layer_id="fc1", kind="linear", num_features=24, num_parameters=600, num_seeds=1)
KERNEL = Kernel(
    kernel_sha256="cd" * 32, blueprint_id="affine", blueprint_version=3, target="linear", num_features=24,
    num_parameters=48, size_bytes=300,
)  # fmt: skip

OFFERED = KernelView("affine", 2, "ab" * 32, 200, LayerKind.LINEAR, 24, 48)


def started(run_id: str) -> OonaMessage:
    return trainer_message(
        run_id, 0, events.RunStarted, step=0, model="N", layers=(LAYER,), edges=(), boundary_steps=10, command_offset=0
    )


def boundary(run_id: str, sequence: int, number: int, **last: int) -> OonaMessage:
    sent = {RUNS.name: sequence - 1, **last}
    return trainer_message(
        run_id, sequence, events.BoundaryReached, step=10 * number, boundary=number, epoch=0, last_sequences=sent
    )


async def test_decisions_commands_and_staleness(stack: EmbeddedStack, tmp_path: Path) -> None:
    run_id, blind = "decided", "blind"  # random draws depend on the run id: with another one the policy may explore
    tamiyo = TamiyoSettings.model_validate(
        {"policy": "schedule", "schedule_every_epochs": 1, "stale_after_s": 0.5, "rng_seed": 1}
    )
    registered = events.KernelRegistered(blueprint_id="affine", kernel=KERNEL)
    epoch = trainer_message(run_id, 1, events.EpochCompleted, step=5, epoch=0, metrics={"val_accuracy": 0.5})
    with running(worker(stack, tmp_path), "worker.ready"):
        async with OonaProducer(stack.settings().need_kafka()) as producer:
            await producer.send_batch(certified_at_once())
            await producer.send(OonaMessage.of(registered, id=ids.kernel_event_id(KERNEL.kernel_sha256), source="test"))
            await wait_until_async(lambda: is_kernel_offered(stack, KERNEL), 40, "the kernel")
            await producer.send_batch([started(run_id), epoch, boundary(run_id, 2, 1)])
            await producer.send_batch([started(blind), boundary(blind, 2, 1, **{TELEMETRY.name: 1})])
        async with DecisionService(stack.settings(), tamiyo) as service:

            async def decided() -> bool:
                await service.tick()
                return bool(await read_run_messages(stack, run_id, DECISIONS)) and bool(
                    await read_run_messages(stack, blind, DECISIONS)
                )

            await wait_until_async(decided, 40, "both decisions")
        (decision,) = await read_run_messages(stack, run_id, DECISIONS)
        assert decision.id == ids.decision_id(run_id, 1, 1)
        assert decision.causation_id == ids.trainer_event_id(run_id, 1, 2)
        assert decision.data.action == "germinate"
        (stale,) = await read_run_messages(stack, blind, DECISIONS)
        assert (stale.data.action, stale.data.stale, stale.data.view_digest) == ("wait", True, None)
        assert "view was still incomplete" in stale.data.reason
        (command,) = await read_run_messages(stack, run_id, COMMANDS)
        assert (command.id, command.causation_id) == (ids.command_id(decision.id), decision.id)
        await check_crash_between_decision_and_command(stack, tamiyo)


async def check_crash_between_decision_and_command(stack: EmbeddedStack, tamiyo: TamiyoSettings) -> None:
    """A rival's view comes first, and a newer kernel after the decision: the view that the decision names counts."""
    run_id = f"died-{uuid.uuid4().hex[:8]}"
    seen, rivals = view_of(run_id, (OFFERED,)), view_of(run_id, ())
    uncommanded = events.DecisionMade(
        run_id=run_id, incarnation=1, boundary=1, step=10, action="germinate", layer_id="fc1", seed_id=0,
        blueprint_id="affine", probability=0.9, policy_id="schedule", policy_version=1, reason="test",
        view_digest=seen.digest,
    )  # fmt: skip
    blind = uncommanded.model_copy(update={"incarnation": 1, "boundary": 2, "step": 20, "view_digest": "ef" * 32})
    decision = ids.decision_id(run_id, 1, 1)
    begun = trainer_message(
        run_id, 1, events.BoundaryReached, step=10, boundary=1, epoch=0, last_sequences={RUNS.name: 0}
    )
    pending = PendingBoundary(run_id, 1, 1, 10, 0, begun.id, None, datetime(2026, 1, 1, tzinfo=UTC), True)
    async with OonaProducer(stack.settings().need_kafka()) as producer:
        await producer.send_batch([started(run_id), begun, boundary(run_id, 2, 2)])
        await producer.send_batch([view_message(rivals, pending), view_message(seen, pending)])
        await producer.send(view_message(replace(rivals, boundary=2), replace(pending, boundary=2)))
        await producer.send(OonaMessage.of(blind, id=ids.decision_id(run_id, 1, 2), source="tamiyo"))
        await producer.send(OonaMessage.of(uncommanded, id=decision, source="tamiyo"))
    async with DecisionService(stack.settings(), tamiyo) as service:

        async def sent() -> bool:
            await service.tick()
            return bool(await read_run_messages(stack, run_id, COMMANDS))

        await wait_until_async(sent, 30, "the command of the decision without one")
    commands = await read_run_messages(stack, run_id, COMMANDS)
    assert {c.id for c in commands} == {ids.command_id(decision)}, "a decision without its view gets no command"
    assert commands[0].data.kernel_sha256 == OFFERED.kernel_sha256
    assert commands[0].data.blueprint_version == OFFERED.blueprint_version


def view_of(run_id: str, kernels: tuple[KernelView, ...]) -> GraphView:
    """The view of a decision at the first boundary; the projections hold a newer kernel of the same blueprint."""
    seed = SeedView("fc1", 0, SeedStage.DORMANT, 0, None, 0, None, NO_HEALTH)
    layer = LayerView("fc1", LayerKind.LINEAR, 24, 600, 1, NO_HEALTH, None)
    return GraphView(run_id, 1, 1, 10, 0, (layer,), (), (seed,), (), kernels)
