"""Exclusions: decisions, reports and records that give no experience. Each is listed with its reason."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Reason(StrEnum):
    """Why something is excluded; tables list reasons in this order."""

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
        Reason.NO_VIEW: "the log does not hold the view of the decision",
        Reason.VIEW_DIFFERS: "the log holds views of the boundary, but none with the digest of the decision",
        Reason.VIEW_DAMAGED: "the recorded view does not match its digest, or cannot be decoded",
        Reason.WRONG_VIEW: "the view belongs to another boundary",
        Reason.NOT_LEGAL: "the decided choice is not legal in the view",
        Reason.WRONG_REPORT: "the report names another seed or blueprint than the decision",
        Reason.NO_DECISION: "a report on a decision that the log does not hold",
        Reason.NO_METRIC: "a fork without a measured metric",
        Reason.RIVAL: "a later decision for a boundary that has one: the first counts",
        Reason.STALE: "WAIT because the view was incomplete: the decision has no view",
        Reason.NO_CHANCE: "too certain for an epsilon-soft policy, for example WAIT after the policy failed",
        Reason.REFUSED: "the trainer rejected the command",
        Reason.BEFORE_AFTER: "only a before/after report, which is not used for training",
        Reason.NO_REPORT: "no report (yet)",
    }
)

FAULTS = frozenset(list(Reason)[: list(Reason).index(Reason.RIVAL)])
"""Reasons that show a truncated, damaged or inconsistent log. The others occur in an intact log too."""


@dataclass(frozen=True, slots=True, order=True)
class Exclusion:
    """A decision, report or record that is left out.

    ``location`` is ``TOPIC[PARTITION]@OFFSET``. Incarnation and boundary are 0 if unknown.
    """

    run_id: str
    incarnation: int
    boundary: int
    reason: Reason
    location: str
    detail: str = ""


def count_by_reason(exclusions: Iterable[Exclusion]) -> dict[Reason, int]:
    """Return the number of exclusions of each reason that occurs, in the order of the reasons."""
    counts = Counter(one.reason for one in exclusions)
    return {reason: counts[reason] for reason in Reason if counts[reason]}
