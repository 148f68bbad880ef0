"""Joins indexed records into experiences: decision to view by digest, decision to report by id. Pure.

Invariant: every decision gives one experience, or one ``Exclusion`` with the reason; so does every report that belongs
to no decision.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from esper.errors import ContractError, NewerVersionError
from esper.graph.graph_view import GraphView
from esper.oona.records import Position
from esper.schemas import ids
from esper.schemas.enums import Action, ReportMethod
from esper.schemas.events import CommandRejected, DecisionMade, FieldReported, ViewRecorded
from esper.services.tamiyo.control.legal_choices import Choice, legal_choices
from esper.services.tamiyo.control.recorded_view import unpack_view
from esper.services.tamiyo.dataset.exclusions import Exclusion, Reason
from esper.services.tamiyo.dataset.experiences import Experiences, Key, StoredExperience
from esper.services.tamiyo.dataset.record_index import RecordIndex, SourcedEvent
from esper.services.tamiyo.evaluation.reward import reward_of
from esper.services.tamiyo.policies import MIN_EPSILON
from esper.services.tamiyo.settings import RentSettings

ROUNDING = 1e-9
"""By how much rounding may lift a probability above the largest one of an epsilon-soft policy."""

Reward = tuple[float, float | None]
"""An estimate in units of the metric, and its variance if known."""

UNMEASURED = frozenset({Reason.NO_METRIC, Reason.BEFORE_AFTER, Reason.NO_REPORT})
"""The decision was carried out as far as is known, and no fork measured its effect."""


@dataclass(frozen=True, slots=True)
class ExperienceJoin:
    """The experiences of a range of the log, and what was excluded.

    Attributes:
        num_decisions: decisions in the range that count; each is an experience or among ``exclusions``.
        measured: by action, how many decisions became experiences, and how many could have if all had been measured.
            Forks are sampled, so evaluation weights experiences by this ratio.
        views: the view of every decision in the range whose view can be read, whether or not it is an experience.
        placebos: run and difference (metric with less metric without) of every placebo among the experiences.
    """

    experiences: Experiences
    exclusions: tuple[Exclusion, ...]
    num_decisions: int
    measured: dict[Action, tuple[int, int]] = field(default_factory=dict)
    views: dict[Key, "ViewReference"] = field(default_factory=dict, repr=False)
    placebos: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ViewReference:
    """Digest and version of a recorded view, and the offsets of innovation.blueprints that it names."""

    digest: str
    view_version: int
    blueprint_offsets: tuple[int, ...]


class _ExcludedError(Exception):
    """A decision gives no experience. Never leaves this module."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def join_experiences(
    index: RecordIndex,
    rent: RentSettings,
    is_in_range: Callable[[Position], bool] = lambda _position: True,
    on_progress: Callable[[int], None] = lambda _num: None,
) -> ExperienceJoin:
    """Make every experience of an index. Only forks give rewards: their gain less rent.

    Args:
        is_in_range: selects decisions by position. Those outside still count as the first decision for their boundary,
            and as the decision of a report.
        on_progress: is called with the number of decisions that are done.

    Raises:
        NewerVersionError: a newer program wrote a view.
    """
    joiner = _Joiner(index, rent)
    num_decisions = 0
    for key, decision, rivals in index.counting_decisions():
        joiner.register(decision, rivals)
        if not is_in_range(decision.position):
            continue
        joiner.add(key, decision, rivals)
        num_decisions += 1
        on_progress(num_decisions)
    exclusions = sorted([*joiner.exclusions, *joiner.orphans(), *index.undecodable])
    measured = {action: joiner.measured(action) for action in Action if joiner.num_eligible[action]}
    experiences = Experiences(joiner.experiences)
    return ExperienceJoin(experiences, tuple(exclusions), num_decisions, measured, joiner.views, joiner.placebos())


class _Joiner:
    def __init__(self, index: RecordIndex, rent: RentSettings) -> None:
        self.experiences: list[StoredExperience] = []
        self.exclusions: list[Exclusion] = []
        self.views: dict[Key, ViewReference] = {}
        self.num_eligible = Counter[Action]()
        self._num_rewarded = Counter[Action]()
        self._index, self._rent = index, rent
        self._decision_ids = set[UUID]()

    def register(self, decision: SourcedEvent, rivals: Sequence[SourcedEvent]) -> None:
        """Note decisions that the log holds, so that reports on them are no orphans."""
        self._decision_ids.update(one.message.id for one in (decision, *rivals))

    def add(self, key: Key, decision: SourcedEvent, rivals: Sequence[SourcedEvent]) -> None:
        """Join the decision that counts for one boundary."""
        for rival in rivals:
            event = rival.message.data
            assert isinstance(event, DecisionMade)
            decided = f"{event.policy_id} {event.policy_version} decided {_describe_decision(event)}"
            self._exclude(key, rival, Reason.RIVAL, decided)
        try:
            self.experiences.append(self._experience(key, decision))
        except _ExcludedError as excluded:
            self._exclude(key, decision, excluded.reason, excluded.detail)

    def measured(self, action: Action) -> tuple[int, int]:
        """Return how many decisions for an action became experiences, and how many could have."""
        return self._num_rewarded[action], self.num_eligible[action]

    def orphans(self) -> Iterator[Exclusion]:
        """Yield the reports on decisions that the log does not hold."""
        for decision_id, reports in self._index.reports.items():
            if decision_id in self._decision_ids:
                continue
            for sourced in reports.values():
                event = sourced.message.data
                assert isinstance(event, FieldReported)
                detail = f"{event.layer_id}:{event.seed_id}, decision {decision_id}"
                yield Exclusion(event.run_id, event.incarnation, 0, Reason.NO_DECISION, sourced.location, detail)

    def placebos(self) -> tuple[tuple[str, float], ...]:
        """Return the differences of placebos, one for each decision: that of the first report in the log.

        The standard deviation of a mean of n draws is that of one draw divided by sqrt(n). Differences are multiplied
        by sqrt(n), so that all spread as a single draw does.
        """
        found = []
        for one in self.experiences:
            for _sourced, report in self._reports_on(one.decision_id):
                fork = report.fork
                if fork and fork.is_placebo and report.before is not None and report.after is not None:
                    found.append((one.run_id, (report.after - report.before) * math.sqrt(fork.num_draws)))
                    break
        return tuple(found)

    def _reports_on(self, decision_id: UUID) -> list[tuple[SourcedEvent, FieldReported]]:
        """Return the reports on a decision in the order of the log."""
        found = []
        for sourced in sorted(self._index.reports.get(decision_id, {}).values(), key=lambda s: s.position):
            report = sourced.message.data
            assert isinstance(report, FieldReported)
            found.append((sourced, report))
        return found

    def _exclude(self, key: Key, sourced: SourcedEvent, reason: Reason, detail: str) -> None:
        self.exclusions.append(Exclusion(*key, reason, sourced.location, detail))

    def _experience(self, key: Key, decision: SourcedEvent) -> StoredExperience:
        event = decision.message.data
        assert isinstance(event, DecisionMade)
        recorded, view = self._view(key, event)
        choices = legal_choices(view)
        chosen = choices.find(event)
        if chosen is None:
            described = _describe_decision(event)
            raise _ExcludedError(Reason.NOT_LEGAL, f"{described}; the view has {len(choices)} legal choices")
        if event.probability > 1.0 - MIN_EPSILON * (1.0 - 1.0 / len(choices)) + ROUNDING:
            raise _ExcludedError(Reason.NO_CHANCE, f"probability {event.probability:g} among {len(choices)} choices")
        try:
            (reward, variance), report = self._reward(key, decision, choices[chosen])
        except _ExcludedError as excluded:
            self.num_eligible[event.action] += excluded.reason in UNMEASURED
            raise
        self.num_eligible[event.action] += 1
        self._num_rewarded[event.action] += 1
        run_id, incarnation, boundary = key
        return StoredExperience(
            run_id=run_id,
            incarnation=incarnation,
            boundary=boundary,
            step=event.step,
            chosen=chosen,
            probability=event.probability,
            policy_id=event.policy_id,
            policy_version=event.policy_version,
            reward=reward,
            reward_variance=variance,
            method=report.method if report else None,
            decision_id=decision.message.id,
            view_digest=recorded.digest,
            view_zstd=recorded.view_zstd,
            is_placebo=report is not None and report.fork is not None and report.fork.is_placebo,
        )

    def _view(self, key: Key, event: DecisionMade) -> tuple[ViewRecorded, GraphView]:
        if event.view_digest is None:
            raise _ExcludedError(Reason.STALE)
        views = self._index.views.get(key, {})
        found = views.get(event.view_digest)
        if found is None:
            expected = f"the decision names {event.view_digest[:12]}"
            if not views:
                raise _ExcludedError(Reason.NO_VIEW, expected)
            recorded = ", ".join(sorted(digest[:12] for digest in views))
            raise _ExcludedError(Reason.VIEW_DIFFERS, f"{expected}, recorded: {recorded}")
        body = found.message.data
        assert isinstance(body, ViewRecorded)
        try:
            view = unpack_view(body.view_zstd, body.digest)
        except NewerVersionError:
            raise
        except ContractError as error:
            raise _ExcludedError(Reason.VIEW_DAMAGED, str(error)) from None
        if (view.run_id, view.incarnation, view.boundary, view.step) != (*key, event.step):
            actual = f"{view.run_id}, incarnation {view.incarnation}, boundary {view.boundary}, step {view.step}"
            raise _ExcludedError(Reason.WRONG_VIEW, f"it is of {actual}")
        self.views[key] = ViewReference(body.digest, body.view_version, view.blueprint_offsets)
        return body, view

    def _reward(self, key: Key, decision: SourcedEvent, choice: Choice) -> tuple[Reward, FieldReported | None]:
        """Return the reward of the first report that has one. Reports on other seeds are excluded."""
        fitting: list[FieldReported] = []
        reports = self._reports_on(decision.message.id)
        decided = _decided_seed(choice)
        for sourced, report in reports:
            reported = (report.layer_id, report.seed_id, report.blueprint_id)
            if reported == decided:
                fitting.append(report)
            else:
                detail = f"{_describe('report on', *reported)}, decided was {_describe(choice.action, *decided)}"
                self._exclude(key, sourced, Reason.WRONG_REPORT, detail)
        if choice.action is Action.WAIT:
            return (0.0, None), None
        forks = [report for report in fitting if report.method is ReportMethod.FORK]
        for report in forks:
            if (reward := reward_of(report, choice.action, self._rent)) is not None:
                return reward, report
        if fitting:
            raise _ExcludedError(Reason.NO_METRIC if forks else Reason.BEFORE_AFTER)
        rejected = self._index.rejections.get(ids.command_id(decision.message.id))
        if rejected is not None:
            assert isinstance(rejected.message.data, CommandRejected)
            raise _ExcludedError(Reason.REFUSED, rejected.message.data.reason)
        raise _ExcludedError(Reason.NO_REPORT, "only on another seed" if reports else "")


def _decided_seed(choice: Choice) -> tuple[str | None, int | None, str | None]:
    """Return layer, seed and blueprint that a report on this choice must name; Nones for WAIT."""
    if choice.seed is None:
        return None, None, None
    blueprint_id = choice.kernel.blueprint_id if choice.kernel else choice.seed.blueprint_id
    return choice.seed.layer_id, choice.seed.seed_id, blueprint_id


def _describe_decision(event: DecisionMade) -> str:
    return _describe(event.action, event.layer_id, event.seed_id, event.blueprint_id)


def _describe(what: str, layer_id: str | None, seed_id: int | None, blueprint_id: str | None) -> str:
    if layer_id is None:
        return what
    return f"{what} {layer_id}:{seed_id}" + (f" {blueprint_id}" if blueprint_id else "")
