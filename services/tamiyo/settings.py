"""The `tamiyo` section of the settings."""

from typing import Literal

from pydantic import Field

from esper.config import SectionModel


class HeuristicSettings(SectionModel):
    """Thresholds of the heuristic policy; docs/heuristic.md explains each."""

    metric: str = "val_accuracy"
    patience: int = Field(3, ge=1)
    min_gain: float = Field(0.02, ge=0)
    tolerance: float = Field(0.02, ge=0)
    max_active: int = Field(1, ge=1)
    cooldown_epochs: int = Field(1, ge=0)
    max_growth: float = Field(4.0, gt=0)


class TamiyoSettings(SectionModel):
    """How Tamiyo decides.

    ``epsilon``: share of decisions drawn from all legal choices. ``stale_after_s``: how long a
    boundary may stay incomplete before the decision is WAIT. ``expiry_boundaries``: how many
    boundaries a command stays valid.
    """

    policy: Literal["heuristic", "wait", "random", "schedule"] = "heuristic"
    policy_version: int = Field(1, ge=1)
    epsilon: float = Field(0.05, ge=0.05, le=1.0)
    rng_seed: int = 0
    poll_s: float = Field(0.05, gt=0)
    stale_after_s: float = Field(5.0, gt=0)
    expiry_boundaries: int = Field(6, ge=1)
    schedule_every_epochs: int = Field(4, ge=1)
    heuristic: HeuristicSettings = HeuristicSettings.model_validate({})
