"""Compares recorded views with those that the log gives today, folded anew from telemetry and all else."""

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from esper.config import Settings
from esper.graph.features import VIEW_VERSION
from esper.services.tamiyo.dataset.experience_join import ViewReference
from esper.services.tamiyo.dataset.experiences import Key
from esper.streams.replay.replay_projection import ProgressCallback, ignore_progress
from esper.streams.replay.view_recompute import recompute_views


@dataclass(slots=True)
class ViewVerification:
    """How recorded views compare.

    Attributes:
        num_equal: the log gives the same bytes again.
        different: boundaries whose view the log gives otherwise though it holds everything, in order, with what it
            gives: a digest, or None where it does not know the boundary.
        expired: boundaries of which it does not hold everything any more (as a rule telemetry), and gives another view.
        older: boundaries whose view is of an older version, which cannot be compared byte by byte.
    """

    num_equal: int = 0
    different: list[tuple[Key, str | None]] = field(default_factory=list)
    expired: list[Key] = field(default_factory=list)
    older: list[Key] = field(default_factory=list)

    @property
    def num_compared(self) -> int:
        """Views of which something can be said."""
        return self.num_equal + len(self.different)


async def verify_views(
    settings: Settings, views: Mapping[Key, ViewReference], tell: ProgressCallback = ignore_progress
) -> ViewVerification:
    """See every view again and compare its digest.

    Raises:
        ConflictError, ConfigError, NewerVersionError, NotAllowedError, UnavailableError: as ``recompute_views``.
    """
    found = ViewVerification(older=sorted(key for key, seen in views.items() if seen.view_version != VIEW_VERSION))
    wanted = {key: seen.blueprint_offsets for key, seen in views.items() if seen.view_version == VIEW_VERSION}
    if not wanted:
        return found
    async with aclosing(recompute_views(settings, wanted, tell)) as seen_again:
        async for again in seen_again:
            digest = again.view.digest if again.view else None
            if digest == views[again.key].digest:
                found.num_equal += 1
            elif again.is_whole:
                found.different.append((again.key, digest))
            else:
                found.expired.append(again.key)
    return found
