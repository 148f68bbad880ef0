"""What a report says that a decision was worth."""

from collections.abc import Callable
from dataclasses import dataclass

from esper.schemas.enums import Action, ReportMethod
from esper.schemas.events import FieldReported
from esper.services.tamiyo.dataset.exclusions import Reason
from esper.services.tamiyo.evaluation.reward import reward_of
from esper.services.tamiyo.settings import RentSettings


@dataclass(frozen=True, slots=True)
class Reward:
    """An estimate, in units of the metric, and its variance where that is known."""

    value: float
    variance: float | None


RewardFunction = Callable[[FieldReported, Action], Reward | Reason]
"""Pure; of a report of an action other than WAIT. Gives the reason where it says nothing that may be trained on."""


def fork_rewards(rent: RentSettings) -> RewardFunction:
    """What ``esper.services.tamiyo.evaluation.reward`` makes of a fork: the gain less rent."""

    def rewarding(report: FieldReported, action: Action) -> Reward | Reason:
        if report.method is not ReportMethod.FORK:
            return Reason.BEFORE_AFTER
        found = reward_of(report, action, rent)
        return Reason.NO_METRIC if found is None else Reward(*found)

    return rewarding
