"""control.kasmina.lifecycle and innovation.field-reports: what became of the seeds."""

from typing import Literal
from uuid import UUID

from esper.schemas.base import BlueprintId, Count, LayerId, Remark, SeedId, Sha256, ShortName
from esper.schemas.enums import BreakerState, RejectionReason, ReportMethod, SeedStage, TransitionReason
from esper.schemas.events.base import TrainerEvent


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


class FieldReported(TrainerEvent):
    """How an adaptation turned out, told when its seed came to its end.

    ``before`` is the metric of the last epoch before the seed germinated, ``after`` that of
    the last epoch before its end. With ``method=before_after`` the difference holds whatever
    else training did meanwhile: it is a record, and no policy is trained on it.
    """

    type: Literal["esper.adaptation.reported.v1"] = "esper.adaptation.reported.v1"
    layer_id: LayerId
    seed_id: SeedId
    blueprint_id: BlueprintId
    outcome: Literal[SeedStage.FOSSILIZED, SeedStage.CULLED, SeedStage.CANCELLED]
    decision_id: UUID
    command_id: UUID
    method: ReportMethod
    metric: ShortName
    before: float | None
    after: float | None
    germinated_at_step: Count
    num_parameters: Count
