"""Joins what was gathered into experiences: decision -> view by digest, decision -> report by id. Pure.

Every decision gives one experience, or one ``Exclusion`` that says why not; so does every report that fits none.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import zstandard

from esper.errors import ContractError, NewerVersionError
from esper.graph.graph_view import GraphView, digest_of
from esper.oona.records import Position
from esper.schemas import ids
from esper.schemas.enums import Action
from esper.schemas.events import CommandRejected, DecisionMade, FieldReported, ViewRecorded
from esper.services.tamiyo.control.legal_choices import Choice, legal_choices
from esper.services.tamiyo.dataset.exclusions import Exclusion, Reason
from esper.services.tamiyo.dataset.experiences import Experiences, Key, StoredExperience
from esper.services.tamiyo.dataset.record_index import RecordIndex, SourcedEvent
from esper.services.tamiyo.dataset.report_rewards import Reward, RewardFunction
from esper.services.tamiyo.policies import MIN_EPSILON

MAX_VIEW_BYTES = 256 * 1024 * 1024
"""A recorded view that claims to be larger is not opened: it is no view of Esper's."""

ROUNDING = 1e-9
"""By so much a probability may be above what epsilon allows."""

NOTHING = Reward(0.0, None)

UNMEASURED = frozenset({Reason.NO_METRIC, Reason.BEFORE_AFTER, Reason.NO_REPORT})
"""The decision was carried out, as far as is known, and no fork told what it was worth."""


@dataclass(frozen=True, slots=True)
class ExperienceJoin:
    """What a log comes to.

    Attributes:
        num_decisions: that count, in the range: each is an experience, or among ``asides``.
        measured: by action, how many decisions became experiences, of how many whose outcome could have been
            measured. Which ones were is chance (forks are sampled), so that evaluation has to weigh it.
        views: the view of every decision in the range that could be read, whatever became of the decision:
            its digest and the offsets of innovation.blueprints that it names.
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
    """What names a recorded view. ``view_version`` is that of its bytes."""

    digest: str
    view_version: int
    blueprint_offsets: tuple[int, ...]


class _ExcludedError(Exception):
    """A decision is set aside. The join's own, never seen outside."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def join(
    gathered: RecordIndex,
    rewarding: RewardFunction,
    is_in_range: Callable[[Position], bool] = lambda _position: True,
    tell: Callable[[int], None] = lambda _num: None,
) -> ExperienceJoin:
    """Make every experience that the log holds.

    Args:
        rewarding: what a report is worth.
        is_in_range: which decisions are asked for, by where they lie. Decisions outside still count for what they
            are: the first for their boundary, and what a report may be of.
        tell: is called with the number of decisions that are done.

    Raises:
        NewerVersionError: a view is of a version that a newer program wrote.
    """
    join_one = _Joiner(gathered, rewarding)
    done = 0
    for key, decision, rivals in gathered.counting_decisions():
        join_one.name(decision, rivals)
        if not is_in_range(decision.position):
            continue
        join_one.add(key, decision, rivals)
        done += 1
        tell(done)
    exclusions = [*join_one.exclusions, *join_one.orphans(), *gathered.broken]
    measured = {action: join_one.measured(action) for action in Action if join_one.eligible[action]}
    return ExperienceJoin(
        Experiences(join_one.made), tuple(sorted(exclusions)), done, measured, join_one.views, join_one.placebos()
    )


class _Joiner:
    def __init__(self, gathered: RecordIndex, rewarding: RewardFunction) -> None:
        self.made: list[StoredExperience] = []
        self.exclusions: list[Exclusion] = []
        self.views: dict[Key, ViewReference] = {}
        self.eligible = Counter[Action]()
        self._rewarded = Counter[Action]()
        self._gathered, self._rewarding = gathered, rewarding
        self._named = set[object]()

    def name(self, decision: SourcedEvent, rivals: Sequence[SourcedEvent]) -> None:
        """These are in the log: their reports have a decision."""
        self._named.update(one.message.id for one in (decision, *rivals))

    def add(self, key: Key, decision: SourcedEvent, rivals: Sequence[SourcedEvent]) -> None:
        """One boundary."""
        for rival in rivals:
            event = rival.message.data
            assert isinstance(event, DecisionMade)
            self._set_aside(key, rival, Reason.RIVAL, f"{event.policy_id} {event.policy_version} said {_told(event)}")
        try:
            self.made.append(self._experience(key, decision))
        except _ExcludedError as exclusion:
            self._set_aside(key, decision, exclusion.reason, exclusion.detail)

    def measured(self, action: Action) -> tuple[int, int]:
        """Decisions to do this that became experiences, and those that could have."""
        return self._rewarded[action], self.eligible[action]

    def orphans(self) -> Iterator[Exclusion]:
        """Reports of decisions that the log does not hold."""
        for decision_id, heard_by_id in self._gathered.reports.items():
            if decision_id in self._named:
                continue
            for heard in heard_by_id.values():
                event = heard.message.data
                assert isinstance(event, FieldReported)
                told = f"{event.layer_id}:{event.seed_id}, decision {decision_id}"
                yield Exclusion(event.run_id, event.incarnation, 0, Reason.NO_DECISION, heard.place, told)

    def placebos(self) -> tuple[tuple[str, float], ...]:
        """The differences of placebos, one a decision: the first in the log.

        A mean of n draws spreads as one draw does, divided by sqrt(n): all are given as if one had been drawn.
        """
        found = []
        for one in self.made:
            for _heard, report in self._reports_of(one.decision_id):
                fork = report.fork
                if fork and fork.is_placebo and report.before is not None and report.after is not None:
                    found.append((one.run_id, (report.after - report.before) * math.sqrt(fork.num_draws)))
                    break
        return tuple(found)

    def _reports_of(self, decision_id: UUID) -> list[tuple[SourcedEvent, FieldReported]]:
        """In the order of the log."""
        found = []
        for heard in sorted(self._gathered.reports.get(decision_id, {}).values(), key=lambda h: h.position):
            report = heard.message.data
            assert isinstance(report, FieldReported)
            found.append((heard, report))
        return found

    def _set_aside(self, key: Key, heard: SourcedEvent, reason: Reason, detail: str) -> None:
        self.exclusions.append(Exclusion(*key, reason, heard.place, detail))

    def _experience(self, key: Key, heard: SourcedEvent) -> StoredExperience:
        event = heard.message.data
        assert isinstance(event, DecisionMade)
        recorded, view = self._view(key, event)
        choices = legal_choices(view)
        chosen = _index(choices, event)
        if event.probability > 1.0 - MIN_EPSILON * (1.0 - 1.0 / len(choices)) + ROUNDING:
            raise _ExcludedError(Reason.NO_CHANCE, f"probability {event.probability:g} among {len(choices)} choices")
        try:
            reward, report = self._reward(key, heard, choices[chosen])
        except _ExcludedError as exclusion:
            self.eligible[event.action] += exclusion.reason in UNMEASURED
            raise
        self.eligible[event.action] += 1
        self._rewarded[event.action] += 1
        return StoredExperience(
            *key,
            step=event.step,
            chosen=chosen,
            probability=event.probability,
            policy_id=event.policy_id,
            policy_version=event.policy_version,
            reward=reward.value,
            reward_variance=reward.variance,
            method=report.method if report else None,
            decision_id=heard.message.id,
            view_digest=recorded.digest,
            view_zstd=recorded.view_zstd,
            is_placebo=report is not None and _is_placebo(report),
        )

    def _view(self, key: Key, event: DecisionMade) -> tuple[ViewRecorded, GraphView]:
        if event.view_digest is None:
            raise _ExcludedError(Reason.STALE)
        views = self._gathered.views.get(key, {})
        found = views.get(event.view_digest)
        if found is None:
            recorded = f"the decision saw {event.view_digest[:12]}"
            if not views:
                raise _ExcludedError(Reason.NO_VIEW, recorded)
            raise _ExcludedError(
                Reason.VIEW_DIFFERS, f"{recorded}, recorded: {', '.join(sorted(d[:12] for d in views))}"
            )
        body = found.message.data
        assert isinstance(body, ViewRecorded)
        view = _opened(body)
        if (view.run_id, view.incarnation, view.boundary, view.step) != (*key, event.step):
            seen = f"{view.run_id}, incarnation {view.incarnation}, boundary {view.boundary}, step {view.step}"
            raise _ExcludedError(Reason.WRONG_VIEW, f"it is of {seen}")
        self.views[key] = ViewReference(body.digest, body.view_version, view.blueprint_offsets)
        return body, view

    def _reward(self, key: Key, decision: SourcedEvent, choice: Choice) -> tuple[Reward, FieldReported | None]:
        """The first report in the log that says something counts; those of other seeds are told of."""
        fitting: list[FieldReported] = []
        reports = self._reports_of(decision.message.id)
        for heard, report in reports:
            if _is_of(report, choice):
                fitting.append(report)
            else:
                told = f"{report.layer_id}:{report.seed_id} {report.blueprint_id}, decided was {_named(choice)}"
                self._set_aside(key, heard, Reason.WRONG_REPORT, told)
        if choice.action is Action.WAIT:
            return NOTHING, None
        found = [(self._rewarding(report, choice.action), report) for report in fitting]
        for reward, report in found:
            if isinstance(reward, Reward):
                return reward, report
        if found:
            raise _ExcludedError(min((r for r, _report in found if isinstance(r, Reason)), key=list(Reason).index))
        self._tell_no_report(decision)
        raise _ExcludedError(Reason.NO_REPORT, "but for one of another seed" if reports else "")

    def _tell_no_report(self, decision: SourcedEvent) -> None:
        rejected = self._gathered.rejections.get(ids.command_id(decision.message.id))
        if rejected is not None:
            event = rejected.message.data
            assert isinstance(event, CommandRejected)
            raise _ExcludedError(Reason.REFUSED, event.reason)


def _is_placebo(report: FieldReported) -> bool:
    return report.fork is not None and report.fork.is_placebo


def _opened(recorded: ViewRecorded) -> GraphView:
    try:
        size = zstandard.get_frame_parameters(recorded.view_zstd).content_size
        if size > MAX_VIEW_BYTES:
            raise _ExcludedError(Reason.VIEW_DAMAGED, f"it claims to have {size:,} bytes")
        data = zstandard.decompress(recorded.view_zstd)
        if digest_of(data) != recorded.digest:
            raise _ExcludedError(
                Reason.VIEW_DAMAGED, f"its bytes are {digest_of(data)[:12]}, named {recorded.digest[:12]}"
            )
        return GraphView.from_bytes(data)
    except NewerVersionError:
        raise
    except (zstandard.ZstdError, ContractError, ValueError) as error:
        raise _ExcludedError(Reason.VIEW_DAMAGED, f"{error}"[:200]) from None


def _index(choices: Sequence[Choice], event: DecisionMade) -> int:
    wanted = (event.action, event.layer_id, event.seed_id, event.blueprint_id)
    for n, choice in enumerate(choices):
        seed, kernel = choice.seed, choice.kernel
        place = (seed.layer_id, seed.seed_id) if seed else (None, None)
        if (choice.action, *place, kernel.blueprint_id if kernel else None) == wanted:
            return n
    raise _ExcludedError(Reason.NOT_LEGAL, f"{_told(event)}; the view offers {len(choices)} choices")


def _is_of(report: FieldReported, choice: Choice) -> bool:
    if choice.seed is None:
        return False
    blueprint_id = choice.kernel.blueprint_id if choice.kernel else choice.seed.blueprint_id
    told = (report.layer_id, report.seed_id, report.blueprint_id)
    return told == (choice.seed.layer_id, choice.seed.seed_id, blueprint_id)


def _told(event: DecisionMade) -> str:
    if event.layer_id is None:
        return event.action
    blueprint = f" {event.blueprint_id}" if event.blueprint_id else ""
    return f"{event.action} {event.layer_id}:{event.seed_id}{blueprint}"


def _named(choice: Choice) -> str:
    if choice.seed is None:
        return choice.action
    blueprint_id = choice.kernel.blueprint_id if choice.kernel else choice.seed.blueprint_id
    return f"{choice.action} {choice.seed.layer_id}:{choice.seed.seed_id} {blueprint_id}"
