"""The `tamiyo.network` and `tamiyo.training` sections of the settings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from esper.config import SectionModel

Positive = Annotated[int, Field(ge=1)]


class NetworkSettings(SectionModel):
    """How the learnt policy is run."""

    scatter: Literal["auto", "torch-scatter", "torch-geometric"] = Field(
        "auto", description="What pools: torch-scatter where it is installed, or the one that is named."
    )
    device: str = Field("auto", description="Where it computes; auto is CUDA where there is a device.")
    threads: Positive = Field(
        1,
        description="torch's threads on the CPU. The network is small: more of them wait for cores that trainers use.",
    )
    autocast: bool = Field(True, description="Compute in bfloat16 on CUDA.")
    compile_encoders: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile the node encoders: auto where it pays, on CUDA."
    )


class TrainingSettings(SectionModel):
    """How a policy is trained from experiences."""

    metric: str = Field("val_accuracy", description="The metric whose course the network reads.")
    temperature: float = Field(
        0.002, gt=0, description="How much better a choice must look, in units of the reward, to be preferred e-fold."
    )
    width: int = Field(16, ge=1, le=1024, description="Width of the network's layers.")
    rounds: int = Field(1, ge=0, le=16, description="Rounds of messages between the layers of a model.")
    capacity: Positive = Field(100_000, description="Experiences that the replay buffer holds.")
    batch_size: Positive = Field(256, description="Experiences behind one update of the weights.")
    mini_batch_size: Positive = Field(32, description="Experiences in one pass; the gradients of a batch are added up.")
    num_batches: Positive = Field(200, description="Updates, at most.")
    eval_every: Positive = Field(10, description="The held-out runs are looked at after so many updates.")
    patience: Positive = Field(10, description="Training ends after so many looks at a loss that is clearly worse.")
    learning_rate: float = Field(3e-3, gt=0, description="The highest learning rate of the one cycle.")
    weight_decay: float = Field(1.0, ge=0, description="AdamW's weight decay.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Share of inputs and codes that is left out while it learns.")
    weight_average_decay: float = Field(
        0.9, ge=0, lt=1, description="Of the weights that are kept: how much of their moving average stays an update."
    )
    max_gradient_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    value_loss_weight: float = Field(0.5, ge=0, description="Weight of the value's loss beside that of the gain.")
    anonymous_blueprint_share: float = Field(
        0.1, ge=0, lt=1, description="Share of blueprints that go by no name, so that unknown ones can be judged."
    )
    threads: Positive = Field(1, description="torch's threads; another number can give other bits.")
    rng_seed: int = Field(0, description="Where training's chance starts.")

    @model_validator(mode="after")
    def _batches_are_whole(self) -> "TrainingSettings":
        if self.batch_size % self.mini_batch_size:
            raise ValueError("batch_size must be a multiple of mini_batch_size")
        return self
