"""The `tamiyo` section of the settings."""

from typing import ClassVar, Literal

from pydantic import Field

from esper.config import SectionModel
from esper.metrics.settings import MetricsEndpointSettings
from esper.services.tamiyo.gnn.settings import NetworkSettings, TrainingSettings


class HeuristicSettings(SectionModel):
    """Thresholds of the heuristic policy; docs/design/policies.md explains each."""

    metric: str = Field("val_accuracy", description="Name of the run metric that the policy watches; higher is better.")
    patience: int = Field(
        3, ge=1, description="Recent epochs compared with the best before them; too few mistake noise for a plateau."
    )
    min_gain: float = Field(
        0.02, ge=0, description="Smallest improvement of the metric that is progress; with less, a seed germinates."
    )
    tolerance: float = Field(
        0.02, ge=0, description="Largest loss of the metric with which a seed is fossilized; above it, it is culled."
    )
    max_active: int = Field(
        1, ge=1, description="Maximum number of active seeds per run. With more than 1, their effects mix."
    )
    cooldown_epochs: int = Field(1, ge=0, description="Minimum number of epochs between two germinations.")
    max_growth: float = Field(
        4.0, gt=0, description="Maximum size of a new kernel, as a multiple of its layer's own number of parameters."
    )


class RentSettings(SectionModel):
    """What added size costs in a reward, in units of the metric; docs/design/reward.md explains it."""

    parameters: float = Field(
        0.01, ge=0, description="Cost of doubling the model's parameters, in units of the metric; 0 makes them free."
    )
    flops: float = Field(
        0.01,
        ge=0,
        description="Cost of doubling the model's FLOPs per sample, in units of the metric; 0 makes them free.",
    )


class RollbackSettings(SectionModel):
    """When the active policy version is rolled back; the formula is in evaluation/automatic_rollback.py."""

    interval_s: float = Field(30.0, gt=0, description="Seconds between two checks of the active version's results.")
    min_runs: int = Field(
        10, ge=5, description="Minimum number of runs with forked decisions before a version can be rolled back."
    )
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="Confidence, over all checks, that a version is worse than waiting."
    )


class TamiyoSettings(MetricsEndpointSettings):
    """Settings of the controller."""

    metrics_port_variable: ClassVar[str] = "ESPER_TAMIYO__METRICS_PORT"

    policy: Literal["heuristic", "wait", "random", "schedule", "active"] = Field(
        "heuristic", description="Policy that decides; `active` uses the version set by `esper tamiyo activate`."
    )
    policy_version: int = Field(
        1,
        ge=1,
        description="Version number of `policy`; if that is `active`, the version of the default policy.",
    )
    epsilon: float = Field(
        0.05, ge=0.05, le=1.0, description="Fraction of random decisions among the legal choices; learning needs some."
    )
    rng_seed: int = Field(0, description="Seed of the random number generator of the policy.")
    poll_s: float = Field(
        0.05, gt=0, description="Seconds between two queries for complete boundaries; small values load Postgres."
    )
    max_batch: int = Field(32, ge=1, le=4096, description="Maximum number of boundaries decided in one batch.")
    stale_after_s: float = Field(
        5.0, gt=0, description="Seconds to wait for a boundary's full view, then WAIT; keep it above the workers' lag."
    )
    expiry_boundaries: int = Field(
        6, ge=1, description="Boundaries for which a command stays valid; with too few, late ones are rejected."
    )
    schedule_every_epochs: int = Field(
        4, ge=1, description="Number of epochs between two germinations of the `schedule` policy."
    )
    heuristic: HeuristicSettings = Field(
        HeuristicSettings.model_validate({}), description="Thresholds of the heuristic policy."
    )
    random_wait_probability: float | None = Field(
        None, ge=0, lt=1, description="Probability of WAIT under the `random` policy; default: that of other choices."
    )
    rent: RentSettings = Field(RentSettings.model_validate({}), description="Cost of added size in a reward.")
    rollback: RollbackSettings = Field(
        RollbackSettings.model_validate({}), description="Automatic rollback of the active version."
    )
    network: NetworkSettings = Field(NetworkSettings.model_validate({}), description="Execution of the graph network.")
    training: TrainingSettings = Field(
        TrainingSettings.model_validate({}), description="Training of the graph network."
    )
