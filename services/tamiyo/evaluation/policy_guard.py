"""A version that does harm is rolled back by itself: what its forked decisions brought is looked at while it acts.

Runs are the independent units: a run counts by the mean reward of its decisions. A version does harm where the upper
bound of the mean over runs lies below 0, which is what waiting brings:

    m + t(1 - a_k, n - 1) s / sqrt(n) < 0,    a_k = (1 - confidence) / (k (k + 1)),    k = n - min_runs + 1

n runs with mean m and deviation s. It is looked at again with every run that is added, and all the a_k sum to
1 - confidence: so is the chance at most, by the union bound and where means over runs are about normal, that a version
which does no harm is ever rolled back.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

from esper.errors import ConflictError
from esper.logging import get_logger
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.evaluation.reward import reward_of, student_t
from esper.services.tamiyo.settings import GuardSettings, RentSettings
from esper.services.tamiyo.versions.activation import rollback
from esper.streams.database.connection_types import Connection
from esper.streams.read_models.policy_versions import ForkedDecision, PolicyChange, forked_decisions, policy_changes

_log = get_logger(__name__)


def mean_rewards(decided: Iterable[ForkedDecision], rent: RentSettings) -> list[float]:
    """The mean reward of each run's decisions."""
    by_run: dict[str, list[float]] = {}
    for one in decided:
        found = reward_of(one.report, one.action, rent)
        if found is not None and not one.is_placebo:
            by_run.setdefault(one.report.run_id, []).append(found[0])
    return [fmean(rewards) for _run, rewards in sorted(by_run.items())]


def harm(rewards: Sequence[float], guard: GuardSettings) -> str | None:
    """Why a version is not to go on, given the mean reward of each of its runs; None where nothing is against it."""
    num = len(rewards)
    if num < guard.min_runs:
        return None
    look = num - guard.min_runs + 1
    level = (1.0 - guard.confidence) / (look * (look + 1))
    mean, deviation = fmean(rewards), stdev(rewards)
    bound = mean + student_t(1.0 - level, num - 1) * deviation / math.sqrt(num)
    if bound >= 0.0:
        return None
    return (
        f"it does harm: over {num} runs its forked decisions brought {mean:+.4f} a run, at most {bound:+.4f} with "
        f"{100 * (1 - level):.2f} % confidence; waiting brings 0"
    )


class PolicyGuard:
    """Looks at the version that is active, every ``interval_s``, and says whether it has to go."""

    def __init__(
        self, guard: GuardSettings, rent: RentSettings, source: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._guard, self._rent, self._source, self._clock = guard, rent, source, clock
        self._looked_at = -math.inf
        self._done: set[uuid.UUID] = set()

    async def look(self, connection: Connection, active: PolicyChange | None) -> OonaMessage | None:
        """The event that rolls ``active`` back, if it does harm. Several controllers that find so write one event."""
        now = self._clock()
        if active is None or active.id in self._done or now - self._looked_at < self._guard.interval_s:
            return None
        self._looked_at = now
        reason = harm(mean_rewards(await forked_decisions(connection, active), self._rent), self._guard)
        if reason is None:
            return None
        self._done.add(active.id)
        try:
            event_id = uuid.uuid5(active.id, "guard")
            back = rollback(await policy_changes(connection), f"by itself: {reason}", self._source, event_id)
        except ConflictError as error:
            _log.error("policy.rollback_failed", policy=str(active.version), reason=reason, detail=str(error))
            return None
        _log.warning("policy.rolled_back", policy=str(active.version), reason=reason)
        return back
