"""Transitions as plans, the schedule of stages, and how alpha rises.

A plan can be written to the outbox first and applied after: an event never lags its effect.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from esper.schemas.enums import SeedStage, TransitionReason

STEEPNESS = 10.0  # of the sigmoid: it runs from -STEEPNESS/2 to +STEEPNESS/2


class AlphaCurve(StrEnum):
    """How alpha rises over GRAFTING, p being the share of the stage that has passed.

    linear   p
    cosine   (1 - cos(pi p)) / 2
    sigmoid  (f(p) - f(0)) / (f(1) - f(0)), where f(p) = 1 / (1 + exp(-10 (p - 1/2)))
    """

    LINEAR = "linear"
    COSINE = "cosine"
    SIGMOID = "sigmoid"

    def at(self, share: float) -> float:
        """Alpha after this share of the stage; 0 at 0, 1 from 1 on, never falling."""
        if share <= 0.0 or share >= 1.0:
            return float(share > 0.0)
        if self is AlphaCurve.LINEAR:
            return share
        if self is AlphaCurve.COSINE:
            return 0.5 * (1.0 - math.cos(math.pi * share))
        least = _sigmoid(0.0)
        return min(1.0, (_sigmoid(share) - least) / (1.0 - 2.0 * least))  # which rounding takes it above


def _sigmoid(share: float) -> float:
    return 1.0 / (1.0 + math.exp(-STEEPNESS * (share - 0.5)))


@dataclass(frozen=True, slots=True)
class StageSchedule:
    """How long a seed stays in each stage, in boundaries, and how alpha rises while it is grafted.

    ``evaluating`` is a timeout: a seed that nobody decides about by then is culled.
    """

    germinated: int = 1
    training: int = 6
    grafting: int = 4
    stabilizing: int = 2
    evaluating: int = 12
    embargo: int = 8
    alpha: AlphaCurve = AlphaCurve.LINEAR


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

WHOLE_STAGES = frozenset({SeedStage.STABILIZING, SeedStage.EVALUATING, SeedStage.FOSSILIZED})
"""Stages in which alpha is 1."""
