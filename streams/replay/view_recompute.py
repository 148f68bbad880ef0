"""Recomputes recorded views: replays what they depend on into a scratch schema, and assembles them from its rows.

Replays only the partitions of the requested runs, and only the topics that a view is made of
(docs/design/decisions/0017-view-determinism.md). The live rows are not touched.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from esper.config import Settings
from esper.errors import UnavailableError
from esper.graph.assembly import assemble
from esper.graph.graph_view import GraphView
from esper.graph.health_windows import WINDOW_STEPS
from esper.oona.log_reader import partition_of
from esper.schemas.topics import BLUEPRINTS, LIFECYCLE, RUNS, TELEMETRY
from esper.streams.database.connection_types import Connection
from esper.streams.read_models.view_row_reader import read_view_rows
from esper.streams.replay.replay_log_reader import LogReader, Offsets
from esper.streams.replay.replay_projection import ProgressCallback, ReplayProgress, ReplayProjector, ignore_progress
from esper.streams.replay.replay_session import open_scratch_session

RUN_TOPICS = (RUNS, LIFECYCLE, TELEMETRY)
"""A view's topics that are keyed by run; innovation.blueprints is the other one."""

BoundaryKey = tuple[str, int, int]
"""(run, incarnation, boundary)."""


@dataclass(frozen=True, slots=True)
class RecomputedView:
    """A view, recomputed from the log.

    Attributes:
        view: None if the log does not hold the boundary.
        is_whole: whether the log certainly holds everything that the view depends on; it must then equal the
            recorded one.
    """

    key: BoundaryKey
    view: GraphView | None
    is_whole: bool


async def recompute_views(
    settings: Settings,
    wanted: Mapping[BoundaryKey, Sequence[int]],
    on_progress: ProgressCallback = ignore_progress,
) -> AsyncGenerator[RecomputedView, None]:
    """Recompute views one by one, sorted by key. Close the generator (``aclosing``): that drops the scratch schema.

    Args:
        wanted: boundary -> the offsets of innovation.blueprints that the recorded view names.

    Raises:
        ConflictError: a rebuild or verification runs.
        ConfigError, NewerVersionError, NotAllowedError, UnavailableError: as ``rebuild``.
    """
    async with open_scratch_session(settings, on_progress) as session:
        projector = session.projector
        await session.project_to(await _ends(session.reader, {run_id for run_id, _incarnation, _boundary in wanted}))
        async with projector.connection.transaction(isolation="repeatable_read", readonly=True):
            for number, key in enumerate(sorted(wanted), 1):
                yield await _recompute(projector, key, wanted[key])
                on_progress(ReplayProgress("recomputing views", number, len(wanted)))


async def _ends(reader: LogReader, run_ids: Iterable[str]) -> Offsets:
    end = await reader.end_offsets()
    partitions = {(topic.name, partition_of(run_id, topic)) for run_id in run_ids for topic in RUN_TOPICS}
    return {tp: end[tp] for tp in (*BLUEPRINTS.partitions, *partitions)}


async def _recompute(projector: ReplayProjector, key: BoundaryKey, offsets: Sequence[int]) -> RecomputedView:
    run_id, incarnation, _boundary = key
    kept = [*BLUEPRINTS.partitions, *((topic.name, partition_of(run_id, topic)) for topic in (RUNS, LIFECYCLE))]
    is_kept = not any(projector.first[tp] for tp in kept)
    try:
        view = assemble(await read_view_rows(projector.connection, *key, blueprint_offsets=offsets))
    except UnavailableError:  # the boundary is not in the log
        return RecomputedView(key, None, is_kept)
    has_health = projector.first[TELEMETRY.name, partition_of(run_id, TELEMETRY)] == 0
    if not has_health:
        has_health = await _has_health(projector.connection, run_id, incarnation, view.window_step)
    return RecomputedView(key, view, is_kept and has_health)


async def _has_health(connection: Connection, run_id: str, incarnation: int, window_step: int | None) -> bool:
    """Whether a log that lost its start still holds all telemetry of a view's windows.

    The telemetry of a run is in one partition, in order: if it has an earlier window, it has all of the later ones.
    """
    if window_step is None:
        return True
    before = window_step - WINDOW_STEPS
    query = "SELECT EXISTS (SELECT FROM health_windows WHERE run_id = $1 AND incarnation = $2 AND step < $3)"
    return bool(await connection.fetchval(query, run_id, incarnation, before))
