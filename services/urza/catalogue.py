"""The blueprints that Esper ships, and how they enter the log: proposed, compiled, certified."""

from typing import Any

from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import BlueprintChange, LayerKind
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.messages import OonaMessage

SOURCE = "urza"
FIRST = (LayerKind.LINEAR, LayerKind.CONV2D)
ALL = tuple(LayerKind)
CONV1D = (LayerKind.CONV1D,)
CONV2D = (LayerKind.CONV2D,)


def _spec(module: str, targets: tuple[LayerKind, ...], description: str, **options: float) -> BlueprintSpec:
    return BlueprintSpec(module=module, parameters=options, targets=targets, description=description)


SHIPPED: dict[str, BlueprintSpec] = {
    "noop": _spec("noop", FIRST, "adds nothing: the placebo"),
    "affine": _spec("affine", FIRST, "a scale and a shift per feature"),
    "low-rank-4": _spec("low_rank", FIRST, "a linear map of rank 4", rank=4),
    "bottleneck-2x": _spec("bottleneck", FIRST, "a small MLP, twice as wide", expansion=2.0),
    "depthwise-3x3": _spec("depthwise", CONV2D, "a 3x3 filter per channel"),
    "residual-3x3": _spec("residual", CONV2D, "two 3x3 convolutions", expansion=1.0),
    "norm": _spec("norm", ALL, "what a normalisation would add"),
    "squeeze-excite-4": _spec("squeeze_excite", ALL, "a gate per feature, squeezed to a quarter", reduction=4),
    "mlp-64": _spec("mlp", ALL, "an MLP with 64 hidden units", width=64),
    "noop-conv1d": _spec("noop", CONV1D, "adds nothing: the placebo"),
    "affine-conv1d": _spec("affine", CONV1D, "a scale and a shift per feature"),
    "low-rank-4-conv1d": _spec("low_rank", CONV1D, "a linear map of rank 4", rank=4),
    "bottleneck-2x-conv1d": _spec("bottleneck", CONV1D, "a small MLP, twice as wide", expansion=2.0),
    "depthwise-3": _spec("depthwise", CONV1D, "a filter of 3 taps per channel"),
    "residual-3": _spec("residual", CONV1D, "two convolutions of 3 taps", expansion=1.0),
}
"""Blueprint id -> spec. An id, once released, never changes its spec: other targets need an id of their own."""

LIFE = (BlueprintChange.PROPOSE, BlueprintChange.COMPILE, BlueprintChange.CERTIFY)


def shipping_requests() -> list[OonaMessage]:
    """The requests that bring all shipped blueprints to ``certified``; the same ids every time."""
    return [
        _request(blueprint_id, spec, change, version)
        for blueprint_id, spec in SHIPPED.items()
        for version, change in enumerate(LIFE)
    ]


async def ship(producer: Any, connection: Any) -> int:
    """Send what the projections do not have yet; gives the number of requests sent."""
    known = {r["event_id"] for r in await connection.fetch("SELECT event_id FROM blueprint_changes")}
    missing = [m for m in shipping_requests() if m.id not in known]
    await producer.send_batch(missing)
    return len(missing)


def _request(blueprint_id: str, spec: BlueprintSpec, change: BlueprintChange, version: int) -> OonaMessage:
    event = BlueprintChangeRequested(
        blueprint_id=blueprint_id,
        change=change,
        expected_version=version,
        spec=spec if change is BlueprintChange.PROPOSE else None,
        reason="shipped with Esper",
    )
    return OonaMessage.of(event, id=ids.request_id(f"shipped:{blueprint_id}:{change}"), source=SOURCE)
