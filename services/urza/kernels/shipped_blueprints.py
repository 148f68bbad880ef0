"""The blueprints that Esper ships. They enter the log as any other: proposed, then certified when they pass."""

from typing import Any

from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import BlueprintChange, LayerKind
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.messages import OonaMessage
from esper.services.urza.projection_reader import ProjectionReader

SOURCE = "urza"
LINEAR_AND_CONV2D = (LayerKind.LINEAR, LayerKind.CONV2D)
ALL_KINDS = tuple(LayerKind)
CONV1D = (LayerKind.CONV1D,)
CONV2D = (LayerKind.CONV2D,)


def _spec(module: str, targets: tuple[LayerKind, ...], description: str, **options: float) -> BlueprintSpec:
    return BlueprintSpec(module=module, parameters=options, targets=targets, description=description)


SHIPPED: dict[str, BlueprintSpec] = {
    "noop": _spec("noop", LINEAR_AND_CONV2D, "adds nothing: the placebo"),
    "affine": _spec("affine", LINEAR_AND_CONV2D, "a scale and a shift per feature"),
    "low-rank-4": _spec("low_rank", LINEAR_AND_CONV2D, "a linear map of rank 4", rank=4),
    "bottleneck-2x": _spec("bottleneck", LINEAR_AND_CONV2D, "a small MLP, twice as wide", expansion=2.0),
    "depthwise-3x3": _spec("depthwise", CONV2D, "a 3x3 filter per channel"),
    "residual-3x3": _spec("residual", CONV2D, "two 3x3 convolutions", expansion=1.0),
    "norm": _spec("norm", ALL_KINDS, "what a normalisation would add"),
    "squeeze-excite-4": _spec("squeeze_excite", ALL_KINDS, "a gate per feature, squeezed to a quarter", reduction=4),
    "mlp-64": _spec("mlp", ALL_KINDS, "an MLP with 64 hidden units", width=64),
    "noop-conv1d": _spec("noop", CONV1D, "adds nothing: the placebo"),
    "affine-conv1d": _spec("affine", CONV1D, "a scale and a shift per feature"),
    "low-rank-4-conv1d": _spec("low_rank", CONV1D, "a linear map of rank 4", rank=4),
    "bottleneck-2x-conv1d": _spec("bottleneck", CONV1D, "a small MLP, twice as wide", expansion=2.0),
    "depthwise-3": _spec("depthwise", CONV1D, "a filter of 3 taps per channel"),
    "residual-3": _spec("residual", CONV1D, "two convolutions of 3 taps", expansion=1.0),
}
"""Blueprint id -> spec. A released id never changes its spec, description included: other targets need another id."""


def shipped_proposals() -> list[OonaMessage]:
    """The proposals of all shipped blueprints, with the same ids every time."""
    return [
        OonaMessage.of(
            BlueprintChangeRequested(
                blueprint_id=blueprint_id,
                change=BlueprintChange.PROPOSE,
                expected_version=0,
                spec=spec,
                reason="shipped with Esper",
            ),
            id=ids.request_id(f"shipped:{blueprint_id}:{BlueprintChange.PROPOSE}"),
            source=SOURCE,
        )
        for blueprint_id, spec in SHIPPED.items()
    ]


async def propose_shipped(producer: Any, reader: ProjectionReader) -> int:
    """Propose the blueprints that the projections do not have yet. Returns the number of proposals sent."""
    proposals = shipped_proposals()
    rows = await reader.all("verdicts", sql_file="library", event_ids=[m.id for m in proposals])
    known = {row["event_id"] for row in rows}
    missing = [m for m in proposals if m.id not in known]
    await producer.send_batch(missing)
    return len(missing)


async def are_shipped_validated(reader: ProjectionReader) -> bool:
    """Whether every shipped blueprint is certified, rejected or retired."""
    row = await reader.one("num_validated", sql_file="library", blueprint_ids=list(SHIPPED))
    return row is not None and row["count"] == len(SHIPPED)
