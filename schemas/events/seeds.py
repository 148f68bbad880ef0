"""control.kasmina.lifecycle and innovation.field-reports: what became of the seeds."""

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
"""Where an adaptation ends."""


class SeedTransitioned(TrainerEvent):
    """A seed moved. ``command_id`` is that of the command that germinated, culled or fossilized it.

    An impossible move is still a fact: it is refused in Kasmina, not here, and a projection
    that reads one flags it.
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
    """A command was not carried out."""

    type: Literal["esper.command.rejected.v1"] = "esper.command.rejected.v1"
    layer_id: LayerId
    seed_id: SeedId
    command_id: UUID
    reason: RejectionReason
    detail: Remark = ""


class BreakerChanged(TrainerEvent):
    """A seed's circuit breaker opened, let a trial through or closed: while it is open the host's output is used.

    ``num_failures`` counts failures in a row, ``detail`` says what the newest one was. The breaker
    is a protection beside the lifecycle: the seed's stage is told by ``SeedTransitioned`` alone.
    """

    type: Literal["esper.seed-breaker.changed.v1"] = "esper.seed-breaker.changed.v1"
    layer_id: LayerId
    seed_id: SeedId
    from_state: BreakerState
    to_state: BreakerState
    num_failures: Count
    detail: Remark = ""


class ForkedPair(FrozenContract):
    """How a fork was made: two branches from one snapshot, on the same batches, one of them without the adaptation.

    Attributes:
        horizon_steps: optimizer steps from the snapshot to where the metric was taken, in both branches.
        num_draws: batch orders that ``before`` and ``after`` are means over. The first is the run's own.
        variance: estimated variance of ``after - before``, from the spread over the draws; null with one draw.
        is_placebo: the adaptation adds nothing, and its branches were given different batches: the
            difference is noise, and nothing else.
        num_parameters_host: of the model without any seed.
        flops_added: of one forward pass over one sample, through what the adaptation adds.
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
    """How an adaptation turned out.

    With ``method=before_after`` it is told when the seed came to its end, which is ``outcome``. ``before`` is the
    metric of the last epoch before the seed germinated, ``after`` that of the last epoch before its end. The
    difference holds whatever else training did meanwhile: it is a record, and no policy is trained on it.

    With ``method=fork`` the effect of one decision is told, whichever ``decision_id`` names: to germinate, to
    fossilize or to cull. ``before`` is the metric of the branch without the adaptation, ``after`` that of the branch
    with it, at the same step. It is told when the branches are trained, which may be after the seed's end;
    ``outcome`` is where the adaptation stood at the horizon, on the run's own line. docs/design/reward.md has the estimator.
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
    def _fork_goes_with_its_method(self) -> Self:
        if (self.method is ReportMethod.FORK) != (self.fork is not None):
            raise ValueError("fork goes with method=fork alone")
        if self.fork is None and self.outcome not in END_STAGES:
            raise ValueError(f"{self.outcome}: a report of method=before_after is told at a seed's end")
        return self
