"""Decisions and reports that no experience can be made of: told one by one with the reason, never averaged over."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Reason(StrEnum):
    """Why something is set aside. The order is that of the table."""

    UNDECODABLE = "undecodable"
    NO_VIEW = "no_view"
    VIEW_DIFFERS = "view_differs"
    VIEW_DAMAGED = "view_damaged"
    WRONG_VIEW = "wrong_view"
    NOT_LEGAL = "not_legal"
    WRONG_REPORT = "wrong_report"
    NO_DECISION = "no_decision"
    NO_METRIC = "no_metric"
    RIVAL = "rival"
    STALE = "stale"
    NO_CHANCE = "no_chance"
    REFUSED = "refused"
    BEFORE_AFTER = "before_after"
    NO_REPORT = "no_report"


DESCRIPTIONS: Mapping[Reason, str] = MappingProxyType(
    {
        Reason.UNDECODABLE: "a record that cannot be decoded",
        Reason.NO_VIEW: "the log does not hold the view that the decision saw",
        Reason.VIEW_DIFFERS: "views of the boundary are there, none with the digest that the decision names",
        Reason.VIEW_DAMAGED: "the recorded view does not have the bytes that its digest says, or is no view",
        Reason.WRONG_VIEW: "the view is of another boundary",
        Reason.NOT_LEGAL: "the view does not offer what was chosen",
        Reason.WRONG_REPORT: "the report is of another seed or blueprint than the decision",
        Reason.NO_DECISION: "a report of a decision that the log does not hold",
        Reason.NO_METRIC: "a fork that could not be measured",
        Reason.RIVAL: "a later decision for a boundary that has one: the first counts",
        Reason.STALE: "WAIT because the views were behind: nothing was seen",
        Reason.NO_CHANCE: "surer than any epsilon-soft policy: nothing was drawn, as where a policy fails",
        Reason.REFUSED: "the trainer refused the command",
        Reason.BEFORE_AFTER: "only a before/after report: nothing is trained on that",
        Reason.NO_REPORT: "no report (yet)",
    }
)
"""What each says to people."""

FAULTS = frozenset(list(Reason)[: list(Reason).index(Reason.RIVAL)])
"""The log is truncated, damaged or inconsistent. The others happen in a whole log too."""


@dataclass(frozen=True, slots=True, order=True)
class Exclusion:
    """One decision, report or record that is left out.

    ``place`` is where it lies, ``TOPIC[PARTITION]@OFFSET``. Incarnation and boundary are 0 where they are not known.
    """

    run_id: str
    incarnation: int
    boundary: int
    reason: Reason
    place: str
    detail: str = ""


def count_by_reason(exclusions: Iterable[Exclusion]) -> dict[Reason, int]:
    """How many of each reason, in the order of the reasons; those that do not occur are left out."""
    found = Counter(one.reason for one in exclusions)
    return {reason: found[reason] for reason in Reason if found[reason]}
