"""The blueprints that Esper ships, and how they enter the log: proposed, compiled, certified."""

from typing import Any

from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import BlueprintChange, LayerKind
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.messages import OonaMessage

SOURCE = "urza"
BOTH = (LayerKind.LINEAR, LayerKind.CONV2D)
CONV = (LayerKind.CONV2D,)

SHIPPED: dict[str, BlueprintSpec] = {
    "noop": BlueprintSpec(module="noop", targets=BOTH, description="adds nothing: the placebo"),
    "affine": BlueprintSpec(module="affine", targets=BOTH, description="a scale and a shift per feature"),
    "low-rank-4": BlueprintSpec(
        module="low_rank", parameters={"rank": 4}, targets=BOTH, description="a linear map of rank 4"
    ),
    "bottleneck-2x": BlueprintSpec(
        module="bottleneck",
        parameters={"expansion": 2.0},
        targets=BOTH,
        description="a small MLP, twice as wide",
    ),
    "depthwise-3x3": BlueprintSpec(module="depthwise", targets=CONV, description="a 3x3 filter per channel"),
    "residual-3x3": BlueprintSpec(
        module="residual", parameters={"expansion": 1.0}, targets=CONV, description="two 3x3 convolutions"
    ),
}
"""Blueprint id -> spec. An id, once released, never changes its spec."""

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
