"""telemetry.seed.health: health signals of layers on sampled steps."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.schemas.base import Epoch, LayerId
from esper.schemas.events.base import TrainerEvent
from esper.schemas.operational import CheckedByReport, HealthSignal


class LayerHealthMeasured(TrainerEvent):
    """The health signals of one layer at one step, one for each of its seeds."""

    type: Literal["esper.layer-health.measured.v2"] = "esper.layer-health.measured.v2"
    epoch: Epoch
    layer_id: LayerId
    signals: Annotated[tuple[Annotated[HealthSignal, CheckedByReport], ...], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _check_signals(self) -> Self:
        own = self.layer_id
        for signal in self.signals:
            if signal.layer_id != own:
                raise ValueError(f"signals: layer_id must be the report's, {own!r}; got {signal.layer_id!r}")
            if signal.non_finite and signal.health_score > 0.0:
                raise ValueError(f"health_score of seed {signal.seed_id} must be 0 where a statistic is not finite")
        return self
