"""The `trainer` section: one training run."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.config import SectionModel
from esper.connection.settings import LinkOptions
from esper.kasmina.lifecycle import AlphaCurve

Positive = Annotated[int, Field(ge=1)]


class ScheduleSettings(SectionModel):
    """PlanTrainer long a seed stays in each stage, in boundaries, and how alpha rises."""

    germinated: Positive = Field(1, description="Boundaries in GERMINATED.")
    training: Positive = Field(6, description="Boundaries in TRAINING.")
    grafting: Positive = Field(4, description="Boundaries in GRAFTING, while alpha rises.")
    stabilizing: Positive = Field(2, description="Boundaries in STABILIZING.")
    evaluating: Positive = Field(12, description="Boundaries in EVALUATING before the seed is culled.")
    embargo: Positive = Field(8, description="Boundaries that a seed which was given up stays away.")
    alpha: AlphaCurve = Field(AlphaCurve.LINEAR, description="PlanTrainer alpha rises in GRAFTING.")


class ForkSettings(SectionModel):
    """Which decisions are measured by a fork, and what that may cost; docs/design/reward.md explains it."""

    every: float = Field(0.0, ge=0, le=1, description="Share of germinations that are forked; 0 forks none.")
    every_verdict: float = Field(0.0, ge=0, le=1, description="Share of applied culls and fossilizations, likewise.")
    horizon_epochs: Positive = Field(
        3, description="Epoch ends from the decision to the metric, the end of its own epoch not counted."
    )
    draws: Positive = Field(
        1,
        description="Batch orders that a fork is averaged over; the first is the run's own, others take two branches.",
    )
    max_parallel: int = Field(
        1, ge=0, description="Processes that train branches beside the run; 0 trains them in its own, once it is over."
    )
    max_waiting: Positive = Field(16, description="Forks whose snapshots are kept at once; further ones are not made.")
    finish_timeout_s: float = Field(
        300.0, ge=0, description="PlanTrainer long the end of a run waits for its forks, in seconds; then they are dropped."
    )


class TrainerSettings(SectionModel):
    """A run on scikit-learn's digits, or on CIFAR-10."""

    dataset: Literal["digits", "cifar10"] = Field("digits", description="What is learnt.")
    data_folder: Path = Field(
        Path("data"), description="Where `cifar10-train.parquet` is, in the layout of the Hugging Face hub."
    )
    num_images: Positive = Field(
        12_000, description="CIFAR-10's images that are used, a quarter of them for validation."
    )
    network: Literal["digits", "mlp", "cnn"] = Field(
        "digits",
        description="The host: two convolutions and two linear layers, or `depth` layers of one kind and a head.",
    )
    depth: Positive = Field(2, description="Hidden layers of `mlp`, convolutions of `cnn`.")
    epochs: Positive = Field(20, description="Epochs of the run.")
    batch_size: Positive = Field(64, description="Examples in one step.")
    copies: Positive = Field(8, description="Augmented copies of the training set in one epoch.")
    channels: Positive = Field(6, description="Width of the convolutions.")
    hidden: Positive = Field(12, description="Width of the hidden linear layers.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="The optimizer.")
    learning_rate: float = Field(0.05, gt=0, description="Its learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Its momentum, where it is `sgd`.")
    rng_seed: int = Field(7, description="Where the run's chance starts: weights, order, augmentation.")
    threads: int = Field(1, ge=0, description="torch's threads; 0 leaves torch's own choice.")
    seeds_per_layer: Positive = Field(2, description="Seeds that each chosen layer holds.")
    checkpoint_epochs: Positive = Field(5, description="A checkpoint after every so many epochs.")
    schedule: ScheduleSettings = Field(
        ScheduleSettings.model_validate({}), description="PlanTrainer long a seed stays in each stage."
    )
    pace_s: float = Field(
        0.0,
        ge=0,
        description="Least time between two boundaries, in seconds, so that decisions reach a run that takes no time.",
    )
    fork: ForkSettings = Field(ForkSettings.model_validate({}), description="Forks, which measure what a decision did.")
    link: LinkOptions = Field(LinkOptions.model_validate({}), description="PlanTrainer the run is linked to Oona.")

    @model_validator(mode="after")
    def _host_fits_the_images(self) -> Self:
        if self.network == "digits" and self.dataset != "digits":
            raise ValueError("network `digits` takes images of 8x8: choose `cnn` or `mlp` for another dataset")
        return self
