"""The `trainer` section: one training run."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.config import SectionModel
from esper.connection.settings import LinkOptions
from esper.kasmina.lifecycle import AlphaCurve

Positive = Annotated[int, Field(ge=1)]


class ScheduleSettings(SectionModel):
    """How long a seed stays in each stage, in boundaries, and how alpha rises."""

    germinated: Positive = Field(1, description="Number of boundaries in GERMINATED.")
    training: Positive = Field(
        6, description="Number of boundaries in TRAINING. Too few: an untrained seed is blended into the output."
    )
    grafting: Positive = Field(
        4, description="Number of boundaries in GRAFTING, while alpha rises from 0 to 1. Few make the step abrupt."
    )
    stabilizing: Positive = Field(2, description="Number of boundaries in STABILIZING.")
    evaluating: Positive = Field(
        12, description="Maximum number of boundaries in EVALUATING; the seed is culled if no decision comes by then."
    )
    embargo: Positive = Field(
        8, description="Number of boundaries before a seed can germinate again after it was cancelled or culled."
    )
    alpha: AlphaCurve = Field(AlphaCurve.LINEAR, description="Curve along which alpha rises in GRAFTING.")


class ForkSettings(SectionModel):
    """Which decisions are measured by a fork, and what that may cost; docs/design/reward.md explains it."""

    germination_share: float = Field(
        0.0, ge=0, le=1, description="Fraction of germinations that are forked; 0 disables it, 1 is the most expensive."
    )
    verdict_share: float = Field(
        0.0, ge=0, le=1, description="Fraction of applied culls and fossilizations that are forked; 0 disables it."
    )
    horizon_epochs: Positive = Field(
        3, description="Epoch ends after the decision's own epoch until the branches are compared."
    )
    num_batch_orders: Positive = Field(
        1, description="Batch orders that a fork averages over; the first adds one branch, others two."
    )
    max_parallel: int = Field(
        1, ge=0, description="Processes that train branches at once; 0 trains them in the run's process after the run."
    )
    max_pending: Positive = Field(
        16, description="Maximum forks with a snapshot in memory; further decisions are not forked."
    )
    finish_timeout_s: float = Field(
        300.0, ge=0, description="Seconds for which the end of a run waits for its forks; the rest are dropped."
    )


class TrainerSettings(SectionModel):
    """Settings of a training run on scikit-learn's digits or on CIFAR-10."""

    dataset: Literal["digits", "cifar10"] = Field("digits", description="Dataset to train on.")
    data_folder: Path = Field(
        Path("data"), description="Folder with `cifar10-train.parquet`, in the layout of the Hugging Face hub."
    )
    num_images: Positive = Field(
        12_000, description="Number of CIFAR-10 images to use; a quarter of them is for validation."
    )
    network: Literal["digits", "mlp", "cnn"] = Field(
        "digits",
        description="Network: `digits` (two convolutions, two linear layers), or `mlp` or `cnn` of `depth` layers.",
    )
    depth: Positive = Field(2, description="Number of hidden layers of `mlp`, or of convolutions of `cnn`.")
    epochs: Positive = Field(20, description="Number of epochs.")
    batch_size: Positive = Field(64, description="Number of examples per optimizer step.")
    copies: Positive = Field(8, description="Number of augmented copies of the training set in one epoch.")
    channels: Positive = Field(6, description="Number of output channels of the convolutions.")
    hidden: Positive = Field(12, description="Width of the hidden linear layers.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="Optimizer.")
    learning_rate: float = Field(0.05, gt=0, description="Learning rate of the optimizer.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of `sgd`; ignored by `adamw`.")
    rng_seed: int = Field(7, description="Seed of the initial weights, the order of the batches and the augmentation.")
    threads: int = Field(1, ge=0, description="Number of torch threads; 0 leaves torch's default.")
    seeds_per_layer: Positive = Field(2, description="Number of seeds in each selected layer.")
    checkpoint_epochs: Positive = Field(
        5, description="Number of epochs between two checkpoints; a killed run repeats at most this much work."
    )
    schedule: ScheduleSettings = Field(
        ScheduleSettings.model_validate({}), description="How long a seed stays in each stage."
    )
    min_boundary_interval_s: float = Field(
        0.0, ge=0, description="Minimum seconds between boundaries, so that decisions reach very short runs."
    )
    fork: ForkSettings = Field(ForkSettings.model_validate({}), description="Forks, which measure a decision's effect.")
    link: LinkOptions = Field(LinkOptions.model_validate({}), description="Connection of the run to Kafka and S3.")

    @model_validator(mode="after")
    def _check_network_fits_dataset(self) -> Self:
        if self.network == "digits" and self.dataset != "digits":
            raise ValueError("network `digits` takes 8x8 images only; set network to `cnn` or `mlp` for other datasets")
        return self
