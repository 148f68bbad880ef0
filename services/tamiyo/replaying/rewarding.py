"""What a report says that a decision was worth."""

from collections.abc import Callable
from dataclasses import dataclass

from esper.graph.view import GraphView
from esper.schemas.events import FieldReported
from esper.services.tamiyo.choices import Choice
from esper.services.tamiyo.replaying.asides import Reason


@dataclass(frozen=True, slots=True)
class Reward:
    """An estimate, in units of the metric, and its variance where that is known."""

    value: float
    variance: float | None


Rewarding = Callable[[FieldReported, GraphView, Choice], Reward | Reason]
"""Pure. Gives the reason where the report says nothing that may be trained on."""


def gain(report: FieldReported, view: GraphView, choice: Choice) -> Reward | Reason:
    """The fork's difference of the metric, with the adaptation less without it; no rent is taken off."""
    if report.fork is None:
        return Reason.BEFORE_AFTER
    if report.fork.is_placebo:
        return Reason.PLACEBO
    if report.before is None or report.after is None:
        return Reason.NO_METRIC
    return Reward(report.after - report.before, report.fork.variance)
