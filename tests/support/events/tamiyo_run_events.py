"""Messages of a run that Tamiyo decides for: layers with one dormant seed each, and a kernel that fits them."""

from collections.abc import Sequence
from typing import Any

import psycopg

from esper.embedded.stack import EmbeddedStack
from esper.graph.graph_view import NO_HEALTH, EpochView, GraphView, KernelView, LayerView, SeedView
from esper.schemas import events, ids
from esper.schemas.assets import Kernel, LayerNode
from esper.schemas.enums import LayerKind, SeedStage
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import RUNS

FEATURES = 23
"""A width that no layer of another test has, so that their kernels are not offered here."""

KERNEL = Kernel(
    kernel_sha256="ce" * 32, blueprint_id="affine", blueprint_version=3, target="linear", num_features=FEATURES,
    num_parameters=46, size_bytes=300,
)  # fmt: skip
BOUNDARY_STEPS = 10


def trainer_message(run_id: str, sequence: int, event: type[events.TrainerEvent], **fields: Any) -> OonaMessage:
    """An event of incarnation 1 in its envelope."""
    body = event(run_id=run_id, incarnation=1, sequence=sequence, **fields)
    return OonaMessage.of(body, id=ids.trainer_event_id(run_id, 1, sequence), source="test")


def run_started(run_id: str, layer_ids: Sequence[str] = ("fc1",)) -> OonaMessage:
    layers = tuple(
        LayerNode(layer_id=name, kind="linear", num_features=FEATURES, num_parameters=600, num_seeds=1)
        for name in layer_ids
    )
    fields = {"step": 0, "model": "N", "edges": (), "boundary_steps": BOUNDARY_STEPS, "command_offset": 0}
    return trainer_message(run_id, 0, events.RunStarted, layers=layers, **fields)


def epoch_completed(run_id: str, sequence: int) -> OonaMessage:
    return trainer_message(run_id, sequence, events.EpochCompleted, step=5, epoch=0, metrics={"val_accuracy": 0.5})


def boundary_reached(run_id: str, sequence: int, number: int, **last: int) -> OonaMessage:
    sent = {RUNS.name: sequence - 1, **last}
    step = BOUNDARY_STEPS * number
    return trainer_message(
        run_id, sequence, events.BoundaryReached, step=step, boundary=number, epoch=0, last_sequences=sent
    )


def run_ended(run_id: str, sequence: int) -> OonaMessage:
    return trainer_message(
        run_id, sequence, events.RunEnded, step=10_000, status="interrupted", detail="the test is over"
    )


def first_boundary_view(run_id: str, layer_ids: Sequence[str]) -> GraphView:
    """The view of the first boundary, after one epoch, as far as legal actions depend on it."""
    layers = tuple(LayerView(name, LayerKind.LINEAR, FEATURES, 600, 1, NO_HEALTH, None) for name in layer_ids)
    seeds = tuple(SeedView(name, 0, SeedStage.DORMANT, 0, None, 0, None, NO_HEALTH) for name in layer_ids)
    kernel = KernelView("affine", 3, KERNEL.kernel_sha256, 300, LayerKind.LINEAR, FEATURES, 46)
    epochs = (EpochView(0, 5, {"val_accuracy": 0.5}),)
    return GraphView(run_id, 1, 1, BOUNDARY_STEPS, 0, layers, (), seeds, epochs, (kernel,))


async def is_kernel_offered(stack: EmbeddedStack, kernel: Kernel) -> bool:
    """Whether a decision may choose the kernel: it is projected, and its blueprint is certified."""
    async with await psycopg.AsyncConnection.connect(stack.postgres.dsn) as connection:
        schema = stack.settings().need_postgres().schema_name
        found = await connection.execute(
            f"SELECT FROM {schema}.kernels JOIN {schema}.blueprints USING (blueprint_id)"
            " WHERE kernel_sha256 = %s AND status = 'certified'",
            (kernel.kernel_sha256,),
        )
        return await found.fetchone() is not None
