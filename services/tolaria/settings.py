"""The `trainer` section: one training run."""

from typing import Annotated, Literal

from pydantic import Field

from esper.config import SectionModel
from esper.connection.settings import LinkOptions

Positive = Annotated[int, Field(ge=1)]


class ScheduleSettings(SectionModel):
    """How long a seed stays in each stage, in boundaries."""

    germinated: Positive = 1
    training: Positive = 6
    grafting: Positive = 4
    stabilizing: Positive = 2
    evaluating: Positive = 12
    embargo: Positive = 8


class TrainerSettings(SectionModel):
    """A run on scikit-learn's digits.

    ``copies``: augmented copies of the training set in one epoch. ``channels`` and ``hidden``:
    widths of the network. ``threads``: torch's threads; 0 leaves torch's own choice.
    ``checkpoint_epochs``: a checkpoint after every so many epochs.
    """

    dataset: Literal["digits"] = "digits"
    epochs: Positive = 20
    batch_size: Positive = 64
    copies: Positive = 8
    channels: Positive = 6
    hidden: Positive = 12
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    rng_seed: int = 7
    threads: int = Field(1, ge=0)
    seeds_per_layer: Positive = 2
    checkpoint_epochs: Positive = 5
    schedule: ScheduleSettings = ScheduleSettings()
    link: LinkOptions = LinkOptions.model_validate({})
