"""Follows the active version in the log: loads it in the background and swaps it in between two batches.

Invariant: a policy is always active. A version that cannot be loaded changes nothing except logs, metrics and
readiness; loading is retried, and decisions name the policy that made them.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from esper.errors import ConfigError
from esper.logging import get_logger
from esper.retry import Backoff
from esper.services.tamiyo.metrics import TamiyoMetrics
from esper.services.tamiyo.policies import EpsilonSoft, Policy
from esper.services.tamiyo.policies.active_policy import ActivePolicy
from esper.services.tamiyo.policies.policy_sources import PolicySource
from esper.streams.read_models.policy_versions import PolicyChange, PolicyVersion

RETRY_S = (1.0, 60.0)  # first and longest wait before a version is loaded again after an error
START_TIMEOUT_S = 20.0  # how long a start waits for the version in the log; then the default decides

_log = get_logger(__name__)


class PolicyFollower:
    """Holds the active policy. Call ``update`` between two batches.

    Args:
        start: decides until another version is loaded.
        soften: makes a policy epsilon-soft.
    """

    def __init__(
        self,
        start: ActivePolicy,
        sources: Mapping[str, PolicySource],
        soften: Callable[[Policy], EpsilonSoft],
        metrics: TamiyoMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.active = start
        self._sources, self._soften, self._metrics, self._clock = sources, soften, metrics, clock
        self._target: PolicyVersion | None = None
        self._loading: asyncio.Task[Policy] | None = None
        self._retry_at, self._backoff = 0.0, Backoff(*RETRY_S)

    def update(self, change: PolicyChange | None) -> None:
        """Swap in the version that was loaded, if the log still names it; start to load the one that it names now."""
        target = None if change is None or change.version == self.active.version else change.version
        if target != self._target:
            self._set_target(target)
        if self._loading is not None and self._loading.done():
            self._swap(self._loading)
        if self._target is not None and self._loading is None and self._clock() >= self._retry_at:
            self._loading = asyncio.create_task(self._load(self._target), name="tamiyo-load-policy")

    async def start(self, change: PolicyChange | None) -> None:
        """Update for the first time, and wait at most ``START_TIMEOUT_S`` for the version that the log names."""
        self.update(change)
        if self._loading is not None:
            await asyncio.wait([self._loading], timeout=START_TIMEOUT_S)
            self.update(change)

    async def aclose(self) -> None:
        """Cancel a load in progress."""
        if self._loading is not None:
            self._loading.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._loading

    def _set_target(self, target: PolicyVersion | None) -> None:
        if self._loading is not None:
            self._loading.cancel()
        self._target, self._loading = target, None
        self._retry_at = 0.0
        self._backoff.reset()
        if target is None:
            self._metrics.policy_confirmed()

    async def _load(self, version: PolicyVersion) -> Policy:
        source = self._sources.get(version.kind)
        if source is None:
            raise ConfigError(f"this controller has no source of kind {version.kind!r}: {', '.join(self._sources)}")
        return await source.load(version)

    def _swap(self, loaded: asyncio.Task[Policy]) -> None:
        target, self._loading = self._target, None
        assert target is not None
        try:
            policy = loaded.result()
        except Exception as error:  # the code of a policy may raise anything
            self._report_failure(target, error)
            return
        before, self.active = self.active, ActivePolicy(target, self._soften(policy))
        self._target = None
        self._metrics.policy_loaded(target.policy_id, target.version)
        _log.info("policy.swapped", policy=str(target), kind=target.kind, before=str(before.version))

    def _report_failure(self, target: PolicyVersion, error: Exception) -> None:
        retry_s = self._backoff.next_s()
        self._retry_at = self._clock() + retry_s
        detail, current = f"{type(error).__name__}: {error}", self.active.version
        _log.error("policy.load_failed", policy=str(target), error=detail, kept=str(current), retry_s=retry_s)
        self._metrics.policy_load_failed(
            f"{target}, which the log names as active, cannot be loaded ({detail:.300}); {current} still decides"
        )
