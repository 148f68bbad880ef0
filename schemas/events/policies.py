"""control.tamiyo.policies: policy versions, their evaluations, and which version is active. Keyed by the policy."""

from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import ConfigDict, Field, model_validator

from esper.schemas.base import (
    MAX_INT32,
    Count,
    FrozenContract,
    Name,
    NonNegative,
    PolicyId,
    Positive,
    Remark,
    RunId,
    Scalar,
    Sha256,
    ShortName,
    Text,
    UnitInterval,
    Version,
)
from esper.schemas.enums import EvaluationVerdict
from esper.schemas.events.base import Event
from esper.schemas.specs.json_schema_conditions import NOT_EMPTY, NOT_NULL, when

NAMED_BY = "named_by"
BY_SETTINGS = "settings"
"""``parameters[NAMED_BY]`` of an activation by a controller with a fixed policy: valid for that controller alone."""


class LogRange(FrozenContract):
    """Records of one partition, from ``from_offset`` (inclusive) to ``until_offset`` (exclusive)."""

    topic: Name
    partition: Annotated[int, Field(ge=0, le=MAX_INT32)]
    from_offset: Count
    until_offset: Count


class PolicyTrained(Event):
    """A policy version was trained; its weights are in S3 under their SHA-256.

    ``data`` names the part of the log that it was trained on. Where that part was chosen by time, ``from_time_ms``
    (inclusive) and ``until_time_ms`` (exclusive) name the range, in milliseconds since 1970 UTC by the broker's clock.
    ``parameters`` are those that loading needs besides the weights. ``figures`` are measurements; a value that is not
    finite is null.
    """

    type: Literal["esper.policy.trained.v1"] = "esper.policy.trained.v1"
    policy_id: PolicyId
    policy_version: Version
    kind: ShortName
    parent_version: Version | None = None
    weights_sha256: Sha256
    weights_size_bytes: Positive
    parameters: dict[Text, Scalar] = Field(default_factory=dict)
    data: tuple[LogRange, ...] = ()
    from_time_ms: Count | None = None
    until_time_ms: Count | None = None
    num_decisions: Count
    figures: dict[Text, Scalar | None] = Field(default_factory=dict)
    reason: Remark = ""


class PolicyEvaluated(Event):
    """The off-policy evaluation of a policy version against the version that it could replace.

    ``estimate`` is the expected reward of a decision of this version minus that of the other, on runs that neither
    was trained on; ``low`` and ``high`` bound it with ``confidence``. It may be null where support is too thin.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                when(
                    "verdict",
                    verdict,
                    then={"estimate": NOT_NULL, "low": NOT_NULL, "high": NOT_NULL, "held_out_runs": NOT_EMPTY},
                )
                for verdict in ("better", "not_better")
            ]
        }
    )

    type: Literal["esper.policy.evaluated.v1"] = "esper.policy.evaluated.v1"
    policy_id: PolicyId
    policy_version: Version
    against_policy_id: PolicyId
    against_version: Version
    estimator: ShortName
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: UnitInterval
    effective_sample_size: NonNegative
    num_decisions: Count
    held_out_runs: tuple[RunId, ...] = ()
    verdict: EvaluationVerdict
    reason: Remark

    @model_validator(mode="after")
    def _check_estimate(self) -> Self:
        is_whole = None not in (self.estimate, self.low, self.high) and bool(self.held_out_runs)
        if self.verdict is not EvaluationVerdict.TOO_THIN and not is_whole:
            raise ValueError(
                f"verdict {self.verdict}: estimate, low, high and held_out_runs are required; without them use too_thin"
            )
        return self


class PolicyActivated(Event):
    """A policy version became active: it decides from here on."""

    type: Literal["esper.policy.activated.v1"] = "esper.policy.activated.v1"
    policy_id: PolicyId
    policy_version: Version
    kind: ShortName
    parameters: dict[Text, Scalar] = Field(default_factory=dict)
    activation_id: UUID
    reason: Remark


class PolicyRolledBack(Event):
    """A policy version was replaced by one that was active before, which the fields ``to_`` name.

    ``kind`` and ``parameters`` are those of that version's activation: a controller can load it from this event.
    """

    type: Literal["esper.policy.rolled-back.v1"] = "esper.policy.rolled-back.v1"
    policy_id: PolicyId
    policy_version: Version
    to_policy_id: PolicyId
    to_version: Version
    kind: ShortName
    parameters: dict[Text, Scalar] = Field(default_factory=dict)
    reason: Annotated[Remark, Field(min_length=1)]
