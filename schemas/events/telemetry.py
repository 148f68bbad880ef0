"""telemetry.seed.health: what layers say about themselves on sampled steps."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.schemas.base import Epoch, LayerId
from esper.schemas.events.base import TrainerEvent
from esper.schemas.operational import HealthSignal


class LayerHealthMeasured(TrainerEvent):
    """One layer's signals of one step, its seeds side by side."""

    type: Literal["esper.layer-health.measured.v1"] = "esper.layer-health.measured.v1"
    epoch: Epoch
    layer_id: LayerId
    signals: Annotated[tuple[HealthSignal, ...], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _signals_are_of_this_layer(self) -> Self:
        strangers = {s.layer_id for s in self.signals} - {self.layer_id}
        if strangers:
            raise ValueError(f"signals of other layers than {self.layer_id!r}: {min(strangers)!r}")
        return self
