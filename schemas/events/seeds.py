"""control.kasmina.lifecycle and innovation.field-reports: transitions of seeds, and the outcome of adaptations."""

from typing import Literal, Self
from uuid import UUID

from pydantic import ConfigDict, model_validator

from esper.schemas.base import (
    BlueprintId,
    Count,
    FrozenContract,
    LayerId,
    NonNegative,
    Positive,
    Remark,
    SeedId,
    Sha256,
    ShortName,
)
from esper.schemas.enums import BreakerState, RejectionReason, ReportMethod, SeedStage, TransitionReason
from esper.schemas.events.base import TrainerEvent
from esper.schemas.specs.json_schema_conditions import NOT_NULL, NULL, when

END_STAGES = (SeedStage.FOSSILIZED, SeedStage.CULLED, SeedStage.CANCELLED)
"""The stages in which an adaptation ends."""


class SeedTransitioned(TrainerEvent):
    """A seed changed its stage. ``command_id`` names the command that germinated, culled or fossilized it.

    The contract accepts any pair of stages, since the event reports what happened. Kasmina refuses forbidden
    transitions; a projection that reads one flags it.
    """

    type: Literal["esper.seed.transitioned.v1"] = "esper.seed.transitioned.v1"
    layer_id: LayerId
    seed_id: SeedId
    from_stage: SeedStage
    to_stage: SeedStage
    reason: TransitionReason
    blueprint_id: BlueprintId | None = None
    kernel_sha256: Sha256 | None = None
    command_id: UUID | None = None
    num_parameters: Count = 0
    detail: Remark = ""


class CommandRejected(TrainerEvent):
    """A trainer rejected a command."""

    type: Literal["esper.command.rejected.v1"] = "esper.command.rejected.v1"
    layer_id: LayerId
    seed_id: SeedId
    command_id: UUID
    reason: RejectionReason
    detail: Remark = ""


class BreakerChanged(TrainerEvent):
    """A seed's circuit breaker opened, became half open or closed. While it is open the host's output is used.

    ``num_failures`` counts failures in a row, and ``detail`` describes the newest. The breaker does not change the
    seed's stage; ``SeedTransitioned`` alone reports that.
    """

    type: Literal["esper.seed-breaker.changed.v1"] = "esper.seed-breaker.changed.v1"
    layer_id: LayerId
    seed_id: SeedId
    from_state: BreakerState
    to_state: BreakerState
    num_failures: Count
    detail: Remark = ""


class ForkedPair(FrozenContract):
    """The setup of a fork: two branches from one snapshot, on the same batches, one of them without the adaptation.

    Attributes:
        horizon_steps: optimizer steps from the snapshot to the measurement, in both branches.
        num_draws: number of batch orders that ``before`` and ``after`` are means over. The first is the run's own.
        variance: estimated variance of ``after - before``, from the spread over the draws; null with one draw.
        is_placebo: the adaptation adds nothing, and its branches got different batches, so that the difference
            is noise alone.
        num_parameters_host: of the model without any seed.
        flops_added: of one forward pass over one sample, through the modules that the adaptation adds.
        flops_host: the same of the model without any seed.
    """

    horizon_steps: Positive
    num_draws: Positive
    variance: NonNegative | None = None
    is_placebo: bool = False
    num_parameters_host: Positive
    flops_added: Count
    flops_host: Positive


class FieldReported(TrainerEvent):
    """The outcome of an adaptation.

    With ``method=before_after`` the trainer writes it when the seed reaches its end, which is ``outcome``. ``before``
    is the metric of the last epoch before the seed germinated, ``after`` that of the last epoch before its end. The
    difference contains everything else that training did meanwhile: it is a record, and no policy is trained on it.

    With ``method=fork`` it reports the effect of the one decision that ``decision_id`` names: to germinate, to
    fossilize or to cull. ``before`` is the metric of the branch without the adaptation, ``after`` that of the branch
    with it, at the same step. It is written when the branches are trained, which may be after the seed's end;
    ``outcome`` is the stage of the adaptation at the horizon, in the run itself.
    docs/design/reward.md has the estimator.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                when(
                    "method",
                    "fork",
                    then={"fork": NOT_NULL},
                    otherwise={"fork": NULL, "outcome": {"enum": [*END_STAGES]}},
                )
            ]
        }
    )

    type: Literal["esper.adaptation.reported.v2"] = "esper.adaptation.reported.v2"
    layer_id: LayerId
    seed_id: SeedId
    blueprint_id: BlueprintId
    outcome: Literal[
        SeedStage.GERMINATED,
        SeedStage.TRAINING,
        SeedStage.GRAFTING,
        SeedStage.STABILIZING,
        SeedStage.EVALUATING,
        SeedStage.FOSSILIZED,
        SeedStage.CULLED,
        SeedStage.CANCELLED,
    ]
    decision_id: UUID
    command_id: UUID
    method: ReportMethod
    metric: ShortName
    before: float | None
    after: float | None
    germinated_at_step: Count
    num_parameters: Count
    fork: ForkedPair | None = None

    @model_validator(mode="after")
    def _check_fork(self) -> Self:
        if (self.method is ReportMethod.FORK) != (self.fork is not None):
            raise ValueError(f"fork: required for method=fork, not allowed with another; got method={self.method}")
        if self.fork is None and self.outcome not in END_STAGES:
            raise ValueError(
                f"outcome {self.outcome}: method=before_after needs a final stage, {', '.join(END_STAGES)}"
            )
        return self
