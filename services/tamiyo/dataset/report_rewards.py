"""The reward that a field report gives to a decision."""

from collections.abc import Callable
from dataclasses import dataclass

from esper.schemas.enums import Action, ReportMethod
from esper.schemas.events import FieldReported
from esper.services.tamiyo.dataset.exclusions import Reason
from esper.services.tamiyo.evaluation.reward import reward_of
from esper.services.tamiyo.settings import RentSettings


@dataclass(frozen=True, slots=True)
class Reward:
    """An estimate in units of the metric, and its variance if known."""

    value: float
    variance: float | None


RewardFunction = Callable[[FieldReported, Action], Reward | Reason]
"""Pure. Takes a report on an action other than WAIT; returns the reason if the report gives no reward."""


def fork_rewards(rent: RentSettings) -> RewardFunction:
    """Return the reward function that uses forks alone: their gain less rent."""

    def reward_function(report: FieldReported, action: Action) -> Reward | Reason:
        if report.method is not ReportMethod.FORK:
            return Reason.BEFORE_AFTER
        found = reward_of(report, action, rent)
        return Reason.NO_METRIC if found is None else Reward(*found)

    return reward_function
