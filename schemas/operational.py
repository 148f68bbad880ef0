"""What a layer says about itself: health signals."""

import math
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from esper.schemas.base import Count, Fact, LayerId, SeedId, Unit

STATISTICS = ("activation_mean", "activation_std", "dead_ratio", "gradient_norm")


class HealthSignal(Fact):
    """The health of one seed's chunk of a layer's output at one sampled step.

    A layer's output channels are divided among its seeds; ``chunk_id`` names the part that
    the seed watches. A statistic is null where it was not taken (no gradient yet) or where
    it was not finite, and then ``non_finite`` says so: JSON has no NaN, and the sickest
    layers must not be the ones that are lost. ``health_score`` is 1 for healthy, 0 for dead;
    ``esper.kasmina.health`` has its formula.
    """

    layer_id: LayerId
    seed_id: SeedId
    chunk_id: SeedId
    epoch: Count
    health_score: Unit
    activation_mean: float | None = None
    activation_std: Annotated[float, Field(ge=0.0)] | None = None
    dead_ratio: Unit | None = None
    gradient_norm: Annotated[float, Field(ge=0.0)] | None = None
    non_finite: bool = False

    @model_validator(mode="before")
    @classmethod
    def _non_finite_becomes_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lost = [n for n in STATISTICS if isinstance(v := values.get(n), float) and not math.isfinite(v)]
        return {**values, **dict.fromkeys(lost), "non_finite": True} if lost else values

    @model_validator(mode="after")
    def _sick_when_non_finite(self) -> Self:
        if self.non_finite and self.health_score > 0.0:
            raise ValueError("health_score must be 0 where a statistic is not finite")
        return self
