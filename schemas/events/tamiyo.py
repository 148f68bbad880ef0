"""control.tamiyo.views and .decisions: the views that decisions are based on, and the decisions."""

from typing import Annotated, Literal, Self

from pydantic import Base64Bytes, ConfigDict, Field, model_validator

from esper.schemas.base import (
    BlueprintId,
    Boundary,
    Count,
    LayerId,
    PolicyId,
    Probability,
    Remark,
    SeedId,
    Sha256,
    Version,
)
from esper.schemas.enums import Action
from esper.schemas.events.base import RunEvent
from esper.schemas.specs.json_schema_conditions import NOT_NULL, NULL, when


class ViewRecorded(RunEvent):
    """The exact bytes of the view that a decision saw. ``digest`` is their SHA-256 before zstd compression."""

    type: Literal["esper.view.recorded.v1"] = "esper.view.recorded.v1"
    boundary: Boundary
    view_version: Version
    digest: Sha256
    view_zstd: Base64Bytes


class DecisionMade(RunEvent):
    """One decision for one boundary; WAIT is a decision too. Of two for one boundary the first in the log counts.

    ``probability`` is that of the action under the acting (epsilon-soft) policy; off-policy learning needs it. A stale
    decision is a WAIT made because the view did not become complete in time; it has no view.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                when(
                    "action",
                    "wait",
                    then={"layer_id": NULL, "seed_id": NULL},
                    otherwise={"layer_id": NOT_NULL, "seed_id": NOT_NULL},
                ),
                when("action", "germinate", then={"blueprint_id": NOT_NULL}, otherwise={"blueprint_id": NULL}),
                when(
                    "stale",
                    True,
                    then={"action": {"const": "wait"}, "view_digest": NULL},
                    otherwise={"view_digest": NOT_NULL},
                ),
            ]
        }
    )

    type: Literal["esper.decision.made.v1"] = "esper.decision.made.v1"
    boundary: Boundary
    step: Count
    action: Action
    layer_id: LayerId | None = None
    seed_id: SeedId | None = None
    blueprint_id: BlueprintId | None = None
    probability: Probability
    policy_id: PolicyId
    policy_version: Version
    reason: Annotated[Remark, Field(min_length=1)]
    view_digest: Sha256 | None = None
    stale: bool = False

    @model_validator(mode="after")
    def _check_action(self) -> Self:
        has_target = (self.layer_id is not None, self.seed_id is not None)
        if has_target != (self.action is not Action.WAIT,) * 2:
            raise ValueError(
                f"action {self.action}: layer_id and seed_id are required, except for wait, which has none"
            )
        if (self.action is Action.GERMINATE) != (self.blueprint_id is not None):
            raise ValueError(f"action {self.action}: blueprint_id is required for germinate, not allowed with another")
        if self.stale != (self.view_digest is None) or (self.stale and self.action is not Action.WAIT):
            raise ValueError("view_digest: required unless the decision is a stale wait, which has none")
        return self
