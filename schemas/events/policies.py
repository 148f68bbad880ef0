"""control.tamiyo.policies: which versions there are, what was shown of them, and which decides. Keyed by the policy."""

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
"""``parameters[NAMED_BY]`` of an activation that a controller with a fixed policy wrote: it speaks for itself alone."""


class LogRange(FrozenContract):
    """Records of one partition: from ``from_offset`` up to ``until_offset``, which is not among them."""

    topic: Name
    partition: Annotated[int, Field(ge=0, le=MAX_INT32)]
    from_offset: Count
    until_offset: Count


class PolicyTrained(Event):
    """A version that could act: its weights are in S3 under their SHA-256.

    ``data`` says which part of the log it learnt from; where that was chosen by time, so do ``from_time_ms`` and
    ``until_time_ms`` (milliseconds since 1970, UTC, by the broker's clock; the end is not within).
    ``parameters`` is what building it needs beside the weights, ``figures`` what was measured; null is not finite.
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
    """What off-policy evaluation says of a version, against one that it might take over from.

    ``estimate`` is the expected reward of a decision of this version less that of the other, on runs that neither
    was trained on; ``low`` and ``high`` bound it with ``confidence``. Where support is too thin there may be none.
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
    def _a_verdict_has_its_estimate(self) -> Self:
        is_whole = None not in (self.estimate, self.low, self.high) and bool(self.held_out_runs)
        if self.verdict is not EvaluationVerdict.TOO_THIN and not is_whole:
            raise ValueError(
                f"{self.verdict}: estimate, low, high and held_out_runs go with every verdict but too_thin"
            )
        return self


class PolicyActivated(Event):
    """From here on this version of the policy decides."""

    type: Literal["esper.policy.activated.v1"] = "esper.policy.activated.v1"
    policy_id: PolicyId
    policy_version: Version
    kind: ShortName
    parameters: dict[Text, Scalar] = Field(default_factory=dict)
    activation_id: UUID
    reason: Remark


class PolicyRolledBack(Event):
    """``policy_version`` of the policy decides no more; from here on the version that is named by ``to_`` does, again.

    ``kind`` and ``parameters`` are those of its activation, so that it can act without looking that up.
    """

    type: Literal["esper.policy.rolled-back.v1"] = "esper.policy.rolled-back.v1"
    policy_id: PolicyId
    policy_version: Version
    to_policy_id: PolicyId
    to_version: Version
    kind: ShortName
    parameters: dict[Text, Scalar] = Field(default_factory=dict)
    reason: Annotated[Remark, Field(min_length=1)]
