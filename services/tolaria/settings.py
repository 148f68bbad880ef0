"""The `trainer` section: one training run."""

from typing import Annotated, Literal

from pydantic import Field

from esper.config import SectionModel
from esper.connection.settings import LinkOptions
from esper.kasmina.lifecycle import AlphaCurve

Positive = Annotated[int, Field(ge=1)]


class ScheduleSettings(SectionModel):
    """How long a seed stays in each stage, in boundaries, and how alpha rises."""

    germinated: Positive = Field(1, description="Boundaries in GERMINATED.")
    training: Positive = Field(6, description="Boundaries in TRAINING.")
    grafting: Positive = Field(4, description="Boundaries in GRAFTING, while alpha rises.")
    stabilizing: Positive = Field(2, description="Boundaries in STABILIZING.")
    evaluating: Positive = Field(12, description="Boundaries in EVALUATING before the seed is culled.")
    embargo: Positive = Field(8, description="Boundaries that a seed which was given up stays away.")
    alpha: AlphaCurve = Field(AlphaCurve.LINEAR, description="How alpha rises in GRAFTING.")


class TrainerSettings(SectionModel):
    """A run on scikit-learn's digits."""

    dataset: Literal["digits"] = Field("digits", description="What is learnt.")
    epochs: Positive = Field(20, description="Epochs of the run.")
    batch_size: Positive = Field(64, description="Examples in one step.")
    copies: Positive = Field(8, description="Augmented copies of the training set in one epoch.")
    channels: Positive = Field(6, description="Width of the network's convolutions.")
    hidden: Positive = Field(12, description="Width of the network's hidden layer.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="The optimizer.")
    learning_rate: float = Field(0.05, gt=0, description="Its learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Its momentum, where it is `sgd`.")
    rng_seed: int = Field(7, description="Where the run's chance starts: weights, order, augmentation.")
    threads: int = Field(1, ge=0, description="torch's threads; 0 leaves torch's own choice.")
    seeds_per_layer: Positive = Field(2, description="Seeds that each chosen layer holds.")
    checkpoint_epochs: Positive = Field(5, description="A checkpoint after every so many epochs.")
    schedule: ScheduleSettings = Field(
        ScheduleSettings.model_validate({}), description="How long a seed stays in each stage."
    )
    link: LinkOptions = Field(LinkOptions.model_validate({}), description="How the run is linked to Oona.")
