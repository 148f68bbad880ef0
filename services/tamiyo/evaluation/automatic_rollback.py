"""Automatic rollback of the active policy version, if the measured effects of its decisions are worse than waiting.

Whether a version may become active is decided elsewhere: ``versions/activation.py``.

Runs are the independent units: a run counts with the mean reward of its forked decisions. A version is harmful if the
upper confidence bound of the mean over runs lies below 0, the reward of waiting:

    m + t(1 - a_k, n - 1) s / sqrt(n) < 0,    a_k = (1 - confidence) / (k (k + 1)),    k = n - min_runs + 1

n runs with mean m and standard deviation s. The test is repeated with every run that is added. The a_k sum to
1 - confidence, which by the union bound limits the probability that a harmless version is ever rolled back, if means
over runs are approximately normal.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

from esper.errors import ConflictError
from esper.logging import get_logger
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.evaluation.reward import reward_of
from esper.services.tamiyo.settings import RentSettings, RollbackSettings
from esper.services.tamiyo.versions.activation import rollback
from esper.streams.database.connection_types import Connection
from esper.streams.read_models.policy_versions import ForkedDecision, PolicyChange, forked_decisions, policy_changes

_log = get_logger(__name__)


def mean_rewards(decisions: Iterable[ForkedDecision], rent: RentSettings) -> list[float]:
    """Return the mean reward of each run's decisions, without placebos."""
    by_run: dict[str, list[float]] = {}
    for one in decisions:
        found = reward_of(one.report, one.action, rent)
        if found is not None and not one.is_placebo:
            by_run.setdefault(one.report.run_id, []).append(found[0])
    return [fmean(rewards) for _run, rewards in sorted(by_run.items())]


def harm_reason(rewards: Sequence[float], settings: RollbackSettings) -> str | None:
    """Return why a version is harmful, from the mean reward of each of its runs; None if that is not shown."""
    num = len(rewards)
    if num < settings.min_runs:
        return None
    from scipy import stats  # imported here: it takes a second or more, and few controllers have so many forks

    test = num - settings.min_runs + 1
    level = (1.0 - settings.confidence) / (test * (test + 1))
    mean, deviation = fmean(rewards), stdev(rewards)
    bound = mean + float(stats.t.ppf(1.0 - level, num - 1)) * deviation / math.sqrt(num)
    if bound >= 0.0:
        return None
    return (
        f"over {num} runs the forked decisions of this version have a mean reward of {mean:+.4f}, at most {bound:+.4f} "
        f"with {100 * (1 - level):.2f} % confidence; waiting has 0"
    )


class AutomaticRollback:
    """Tests the active version every ``interval_s``, and makes the event that rolls a harmful one back."""

    def __init__(
        self, settings: RollbackSettings, rent: RentSettings, source: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._rent, self._source, self._clock = settings, rent, source, clock
        self._tested_at = -math.inf
        self._harmful: set[uuid.UUID] = set()

    async def check(self, connection: Connection, active: PolicyChange | None) -> OonaMessage | None:
        """Return the event that rolls ``active`` back if it is harmful: once, and the same one in every controller."""
        now = self._clock()
        if active is None or active.id in self._harmful or now - self._tested_at < self._settings.interval_s:
            return None
        self._tested_at = now
        rewards = mean_rewards(await forked_decisions(connection, active), self._rent)
        reason = await asyncio.to_thread(harm_reason, rewards, self._settings)  # its import would stop the event loop
        if reason is None:
            return None
        self._harmful.add(active.id)
        try:
            event_id = uuid.uuid5(active.id, "guard")  # controllers of any release must give one id: keep the text
            changes = await policy_changes(connection)
            message = rollback(changes, f"automatic rollback: {reason}", self._source, event_id)
        except ConflictError as error:
            _log.error("policy.rollback_failed", policy=str(active.version), reason=reason, detail=str(error))
            return None
        _log.warning("policy.rolled_back", policy=str(active.version), reason=reason)
        return message
