"""The assets of Esper: runs and their layers, seeds, blueprints and kernels."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from esper.schemas.base import (
    BlueprintId,
    Contract,
    Count,
    Epoch,
    FrozenContract,
    Incarnation,
    LayerId,
    Name,
    NonNegative,
    NumFeatures,
    Positive,
    RunId,
    SeedId,
    Sha256,
    Text,
    UnitInterval,
    Version,
)
from esper.schemas.enums import BlueprintStatus, LayerKind, RunStatus, SeedStage
from esper.schemas.specs.json_schema_conditions import NOT_NULL, when


class LayerNode(FrozenContract):
    """A node of a run's model graph: one layer that holds seeds.

    ``num_features`` is the size of the layer's output channel dimension, which a kernel must match.
    """

    layer_id: LayerId
    kind: LayerKind
    num_features: NumFeatures
    num_parameters: Count
    num_seeds: Annotated[int, Field(ge=1, le=1024)]


class LayerEdge(FrozenContract):
    """An edge of the model graph: ``target`` reads the output of ``source``, through modules that hold no seeds."""

    source: LayerId
    target: LayerId


class Seed(Contract):
    """The state of one seed of one layer."""

    model_config = ConfigDict(
        json_schema_extra=when("stage", "dormant", otherwise={"blueprint_id": NOT_NULL}, is_default=True)
    )

    layer_id: LayerId
    seed_id: SeedId
    stage: SeedStage = SeedStage.DORMANT
    stage_since_step: Count = 0
    alpha: UnitInterval = 0.0
    blueprint_id: BlueprintId | None = None
    kernel_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _check_blueprint(self) -> Self:
        if self.stage is not SeedStage.DORMANT and self.blueprint_id is None:
            raise ValueError(f"blueprint_id: a {self.stage} seed must name its blueprint; set it, or stage=dormant")
        return self


class BlueprintSpec(FrozenContract):
    """The module that a blueprint builds: a module of the catalogue and its parameters.

    It is declarative, so that nothing which is fetched is ever executed or unpickled.
    """

    module: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    parameters: dict[Text, int | float] = Field(default_factory=dict)
    targets: Annotated[tuple[LayerKind, ...], Field(min_length=1)]
    description: Annotated[Text, Field(max_length=500)] = ""


class Blueprint(Contract):
    """The state of a blueprint. ``version`` counts its accepted changes."""

    blueprint_id: BlueprintId
    version: Version
    status: BlueprintStatus
    spec: BlueprintSpec


class Kernel(Contract):
    """Weights for one blueprint at one width, stored in S3 under their SHA-256."""

    kernel_sha256: Sha256
    blueprint_id: BlueprintId
    blueprint_version: Version
    target: LayerKind
    num_features: NumFeatures
    num_parameters: Count
    size_bytes: Positive


class Measurement(FrozenContract):
    """The measured cost of a blueprint's module in a layer of one kind and width, on the machine that certified it.

    Latency is that of a forward pass over ``batch_size`` samples of ``positions`` positions. Peak memory is the largest
    total size of all tensors during a forward and a backward pass over the same samples: output, intermediate values
    and gradients, without input and parameters.
    """

    target: LayerKind
    num_features: NumFeatures
    num_parameters: Count
    positions: Positive
    flops: Annotated[Count, Field(description="Of a forward pass over one sample of ``positions`` positions.")]
    batch_size: Positive
    latency_p50_ms: NonNegative
    latency_p95_ms: NonNegative
    peak_memory_bytes: Count


class Run(Contract):
    """The state of a training run, over all its incarnations."""

    run_id: RunId
    incarnation: Incarnation
    model: Name
    status: RunStatus
    step: Count = 0
    epoch: Epoch = 0


class TrainingResults(FrozenContract):
    """The results of a run.

    Accuracies are shares in 0..1 on the validation set. ``overhead_percent`` is the time spent inside Esper's calls,
    in percent of the time of the loop without them.
    """

    initial_accuracy: UnitInterval
    final_accuracy: UnitInterval
    adaptations_applied: Count
    overhead_percent: NonNegative
    epochs: Epoch
    steps: Count
    duration_s: NonNegative
