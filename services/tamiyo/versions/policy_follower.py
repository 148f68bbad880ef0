"""The version that the log names as active, loaded beside the one that decides and put in its place between batches.

Invariant: somebody always decides. What cannot be loaded changes nothing but that this is said, by log, metric and
readiness, and that it is tried again; decisions name who made them.
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

RETRY_S = (1.0, 60.0)  # first and longest wait before a version that could not be loaded is tried again
START_S = 20.0  # a start waits so long for the version that the log names, then decides by the default

_log = get_logger(__name__)


class PolicyFollower:
    """Holds who decides. ``look`` is called between two batches, with what the log says.

    Args:
        start: who decides until something else is loaded.
        soften: makes a policy act, with its chance.
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
        self._wanted: PolicyVersion | None = None
        self._loading: asyncio.Task[Policy] | None = None
        self._retry_at, self._backoff = 0.0, Backoff(*RETRY_S)

    def look(self, change: PolicyChange | None) -> None:
        """Take what was loaded since, if it is still what the log names; begin to load what it names now."""
        wanted = None if change is None or change.version == self.active.of else change.version
        if wanted != self._wanted:
            self._want(wanted)
        if self._loading is not None and self._loading.done():
            self._take(self._loading)
        if self._wanted is not None and self._loading is None and self._clock() >= self._retry_at:
            self._loading = asyncio.create_task(self._load(self._wanted), name="tamiyo-load-policy")

    async def start(self, change: PolicyChange | None) -> None:
        """The first look: waits a while for what the log names."""
        self.look(change)
        if self._loading is not None:
            await asyncio.wait([self._loading], timeout=START_S)
            self.look(change)

    async def aclose(self) -> None:
        """Give up what is being loaded."""
        if self._loading is not None:
            self._loading.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._loading

    def _want(self, wanted: PolicyVersion | None) -> None:
        if self._loading is not None:
            self._loading.cancel()
        self._wanted, self._loading = wanted, None
        self._retry_at = 0.0
        self._backoff.reset()
        if wanted is None:
            self._metrics.policy_confirmed()

    async def _load(self, version: PolicyVersion) -> Policy:
        source = self._sources.get(version.kind)
        if source is None:
            raise ConfigError(f"this controller has no source of kind {version.kind!r}: {', '.join(self._sources)}")
        return await source.load(version)

    def _take(self, loaded: asyncio.Task[Policy]) -> None:
        wanted, self._loading = self._wanted, None
        assert wanted is not None
        try:
            policy = loaded.result()
        except Exception as error:  # whatever a policy's own code raises
            self._failed(wanted, error)
            return
        before, self.active = self.active, ActivePolicy(wanted, self._soften(policy))
        self._wanted = None
        self._metrics.policy_loaded(wanted.policy_id, wanted.version)
        _log.info("policy.swapped", policy=str(wanted), kind=wanted.kind, before=str(before.of))

    def _failed(self, wanted: PolicyVersion, error: Exception) -> None:
        retry_s = self._backoff.next_s()
        self._retry_at = self._clock() + retry_s
        told = f"{type(error).__name__}: {error}"
        _log.error("policy.load_failed", policy=str(wanted), error=told, kept=str(self.active.of), retry_s=retry_s)
        self._metrics.policy_load_failed(
            f"{wanted}, which the log names as active, cannot be loaded ({told:.300}); {self.acting.of} still decides"
        )
