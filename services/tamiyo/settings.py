"""The `tamiyo` section of the settings."""

from typing import Literal

from pydantic import Field

from esper.config import SectionModel
from esper.metrics.settings import MetricsAddress
from esper.services.tamiyo.gnn.settings import NetworkSettings, TrainingSettings


class HeuristicSettings(SectionModel):
    """Thresholds of the heuristic policy; docs/design/policies.md explains each."""

    metric: str = Field("val_accuracy", description="The metric that is watched.")
    patience: int = Field(3, ge=1, description="The last so many epochs are compared with those before them.")
    min_gain: float = Field(0.02, ge=0, description="Less gain than this is a plateau, and a seed is germinated.")
    tolerance: float = Field(
        0.02, ge=0, description="A seed may cost so much of the metric and still become permanent."
    )
    max_active: int = Field(1, ge=1, description="Seeds awake at once, at most.")
    cooldown_epochs: int = Field(1, ge=0, description="Epochs between two germinations, at least.")
    max_growth: float = Field(
        4.0, gt=0, description="Parameters of a new kernel, at most, as a multiple of its layer's own."
    )


class RentSettings(SectionModel):
    """What size costs, in the metric's own unit; docs/design/reward.md explains it."""

    parameters: float = Field(0.01, ge=0, description="Rent for as many parameters as the host has itself.")
    flops: float = Field(0.01, ge=0, description="Rent for as many FLOPs a sample as the host takes itself.")


class GuardSettings(SectionModel):
    """When a followed version is rolled back automatically; the formula is in evaluation/policy_guard.py."""

    interval_s: float = Field(30.0, gt=0, description="Pause between two looks at what the active version brought.")
    min_runs: int = Field(10, ge=5, description="Runs with forked decisions below which nothing is said.")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="How sure it must be that the version is worse than waiting, over all looks."
    )


class TamiyoSettings(SectionModel):
    """How Tamiyo decides."""

    policy: Literal["heuristic", "wait", "random", "schedule", "active"] = Field(
        "heuristic", description="Which policy decides; `active` follows the one that the log names (`esper tamiyo`)."
    )
    policy_version: int = Field(1, ge=1, description="The version that decisions name, unless the log names it.")
    epsilon: float = Field(0.05, ge=0.05, le=1.0, description="Share of decisions drawn from all legal choices.")
    rng_seed: int = Field(0, description="Where the policy's chance starts.")
    poll_s: float = Field(0.05, gt=0, description="Pause between two looks for complete boundaries, in seconds.")
    max_batch: int = Field(
        32,
        ge=1,
        le=4096,
        description="Boundaries that are decided together, at most.",
    )
    stale_after_s: float = Field(
        5.0, gt=0, description="How long a boundary may stay incomplete before the decision is WAIT, in seconds."
    )
    expiry_boundaries: int = Field(6, ge=1, description="How many boundaries a command stays valid.")
    schedule_every_epochs: int = Field(
        4, ge=1, description="The `schedule` policy germinates a seed every so many epochs."
    )
    heuristic: HeuristicSettings = Field(
        HeuristicSettings.model_validate({}), description="Thresholds of the heuristic policy."
    )
    random_wait_probability: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="What the `random` policy gives to WAIT, where it could do otherwise; "
        "all choices are alike where it is not set.",
    )
    rent: RentSettings = Field(RentSettings.model_validate({}), description="What size costs in a reward.")
    guard: GuardSettings = Field(
        GuardSettings.model_validate({}), description="When the active version is rolled back by itself."
    )
    network: NetworkSettings = Field(NetworkSettings.model_validate({}), description="How the learnt policy is run.")
    training: TrainingSettings = Field(
        TrainingSettings.model_validate({}), description="How the learnt policy is trained."
    )
    metrics_host: str = Field("127.0.0.1", description="The address that metrics and readiness are served on.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Where Prometheus reads; 0 takes a free port, which the log names."
    )

    @property
    def metrics_address(self) -> MetricsAddress:
        """Where Tamiyo answers Prometheus."""
        return MetricsAddress(self.metrics_host, self.metrics_port, "ESPER_TAMIYO__METRICS_PORT")
