"""telemetry.seed.health: what layers say about themselves on sampled steps."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.schemas.base import Epoch, LayerId
from esper.schemas.events.base import TrainerEvent
from esper.schemas.operational import CheckedByReport, HealthSignal


class LayerHealthMeasured(TrainerEvent):
    """One layer's signals of one step, its seeds side by side."""

    type: Literal["esper.layer-health.measured.v2"] = "esper.layer-health.measured.v2"
    epoch: Epoch
    layer_id: LayerId
    signals: Annotated[tuple[Annotated[HealthSignal, CheckedByReport], ...], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _signals_are_of_this_layer_and_sound(self) -> Self:
        own = self.layer_id
        for signal in self.signals:
            if signal.layer_id != own:
                raise ValueError(f"signals of other layers than {own!r}: {signal.layer_id!r}")
            if signal.non_finite and signal.health_score > 0.0:
                raise ValueError(f"health_score of seed {signal.seed_id} must be 0 where a statistic is not finite")
        return self
