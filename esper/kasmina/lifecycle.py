"""Transitions as plans: what is about to happen to a seed, before it has any effect.

A plan can be written to the outbox first and applied after: an event never lags its effect.
"""

from dataclasses import dataclass, replace

from esper.schemas.enums import SeedStage, TransitionReason


@dataclass(frozen=True, slots=True)
class StageSchedule:
    """How long a seed stays in each stage, in boundaries.

    ``evaluating`` is a timeout: a seed that nobody decides about by then is culled.
    """

    germinated: int = 1
    training: int = 6
    grafting: int = 4
    stabilizing: int = 2
    evaluating: int = 12
    embargo: int = 8


@dataclass(frozen=True, slots=True)
class Transition:
    """One planned move of one seed."""

    layer_id: str
    seed_id: int
    from_stage: SeedStage
    to_stage: SeedStage
    reason: TransitionReason
    blueprint_id: str | None = None
    kernel_sha256: str | None = None
    num_parameters: int = 0
    detail: str = ""

    def because(self, reason: TransitionReason, detail: str = "") -> "Transition":
        """The same move for another reason."""
        return replace(self, reason=reason, detail=detail)


NEXT_BY_SCHEDULE = {
    SeedStage.GERMINATED: (SeedStage.TRAINING, "germinated"),
    SeedStage.TRAINING: (SeedStage.GRAFTING, "training"),
    SeedStage.GRAFTING: (SeedStage.STABILIZING, "grafting"),
    SeedStage.STABILIZING: (SeedStage.EVALUATING, "stabilizing"),
    SeedStage.EVALUATING: (SeedStage.CULLED, "evaluating"),
    SeedStage.CANCELLED: (SeedStage.DORMANT, "embargo"),
    SeedStage.CULLED: (SeedStage.DORMANT, "embargo"),
    SeedStage.ROLLED_BACK: (SeedStage.DORMANT, "embargo"),
}
"""Stage -> where the schedule moves it, and the schedule's field that says after how long."""
