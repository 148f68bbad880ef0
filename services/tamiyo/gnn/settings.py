"""The `tamiyo.network` and `tamiyo.training` sections of the settings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from esper.config import SectionModel

Positive = Annotated[int, Field(ge=1)]


class NetworkSettings(SectionModel):
    """How the trained graph network is executed."""

    scatter: Literal["auto", "torch-scatter", "torch-geometric"] = Field(
        "auto", description="Library that pools node features; `auto` prefers torch-scatter if it is installed."
    )
    device: str = Field("auto", description="torch device of the network; `auto` is CUDA if available, else the CPU.")
    threads: Positive = Field(
        1, description="Number of torch threads; the network is small, and more than 1 compete with trainers."
    )
    autocast: bool = Field(True, description="Compute in bfloat16 on CUDA; has no effect on the CPU.")
    compile_encoders: Literal["auto", "on", "off"] = Field(
        "auto", description="Apply torch.compile to the node encoders; `auto` compiles on CUDA only, where it pays off."
    )


class TrainingSettings(SectionModel):
    """How the graph network is trained from experiences."""

    metric: str = Field("val_accuracy", description="Name of the run metric whose history is an input of the network.")
    temperature: float = Field(
        0.002, gt=0, description="Softmax temperature in units of the reward; small values favour the best choice."
    )
    width: int = Field(16, ge=1, le=1024, description="Width of the network's hidden layers.")
    rounds: int = Field(1, ge=0, le=16, description="Number of message-passing rounds between the layers of a model.")
    capacity: Positive = Field(
        100_000, description="Maximum number of experiences in the replay buffer; the oldest are dropped."
    )
    batch_size: Positive = Field(
        256, description="Number of experiences per weight update; a multiple of `mini_batch_size`."
    )
    mini_batch_size: Positive = Field(32, description="Experiences per forward pass; affects memory and speed only.")
    num_batches: Positive = Field(200, description="Maximum number of weight updates.")
    eval_every: Positive = Field(10, description="Number of updates between two evaluations on the validation runs.")
    patience: Positive = Field(
        10, description="Number of consecutive, clearly worse evaluations after which training stops early."
    )
    learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate of the one-cycle schedule.")
    weight_decay: float = Field(1.0, ge=0, description="Weight decay of AdamW.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout probability of inputs and node codes in training.")
    weight_average_decay: float = Field(
        0.9, ge=0, lt=1, description="Decay per update of the moving average of the weights; the average is kept."
    )
    max_gradient_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    value_loss_weight: float = Field(0.5, ge=0, description="Weight of the value loss; the gain loss has weight 1.")
    anonymous_blueprint_share: float = Field(
        0.1, ge=0, lt=1, description="Fraction of examples with hidden blueprint name, to rate unknown ones."
    )
    threads: Positive = Field(
        1, description="Number of torch threads in training; a different number can change the last bits."
    )
    rng_seed: int = Field(0, description="Seed of the random number generators of training.")

    @model_validator(mode="after")
    def _check_batch_size(self) -> "TrainingSettings":
        if self.batch_size % self.mini_batch_size:
            raise ValueError("batch_size must be a multiple of mini_batch_size")
        return self
