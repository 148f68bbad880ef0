"""Compares recorded views with the views that the log gives when they are computed again from telemetry."""

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from esper.config import Settings
from esper.graph.view_features import VIEW_VERSION
from esper.services.tamiyo.dataset.experience_join import ViewReference
from esper.services.tamiyo.dataset.experiences import Key
from esper.streams.replay.replay_projection import ProgressCallback, ignore_progress
from esper.streams.replay.view_recompute import recompute_views


@dataclass(slots=True)
class ViewVerification:
    """The result of a comparison.

    Attributes:
        num_equal: views that the log gives again, byte for byte.
        different: boundaries for which the log gives another view although it holds all of its inputs, with the digest
            of that view; None if the log does not hold the boundary.
        expired: boundaries for which the log gives another view and no longer holds all inputs (usually telemetry).
        older: boundaries whose view has an older version, which cannot be compared byte for byte.
    """

    num_equal: int = 0
    different: list[tuple[Key, str | None]] = field(default_factory=list)
    expired: list[Key] = field(default_factory=list)
    older: list[Key] = field(default_factory=list)


async def verify_views(
    settings: Settings, views: Mapping[Key, ViewReference], on_progress: ProgressCallback = ignore_progress
) -> ViewVerification:
    """Compute every view again and compare digests.

    Raises:
        ConflictError, ConfigError, NewerVersionError, NotAllowedError, UnavailableError: as ``recompute_views``.
    """
    result = ViewVerification(older=sorted(key for key, view in views.items() if view.view_version != VIEW_VERSION))
    wanted = {key: view.blueprint_offsets for key, view in views.items() if view.view_version == VIEW_VERSION}
    if not wanted:
        return result
    async with aclosing(recompute_views(settings, wanted, on_progress)) as recomputed_views:
        async for recomputed in recomputed_views:
            digest = recomputed.view.digest if recomputed.view else None
            if digest == views[recomputed.key].digest:
                result.num_equal += 1
            elif recomputed.is_whole:
                result.different.append((recomputed.key, digest))
            else:
                result.expired.append(recomputed.key)
    return result
