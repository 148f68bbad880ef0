"""Sees views again: folds what they depend on into a schema of its own, and assembles them from its rows.

Only the partitions of the runs that are asked for are folded, and only the topics that a view is made of
(docs/design/decisions/0017-view-determinism.md). The live rows are left alone.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from esper.config import Settings
from esper.errors import UnavailableError
from esper.graph.assembly import assemble
from esper.graph.graph_view import GraphView
from esper.graph.health_windows import WINDOW_STEPS
from esper.oona.admin.topics import cluster_id
from esper.oona.log_reader import partition_of
from esper.oona.records import TopicPartition
from esper.schemas.topics import BLUEPRINTS, LIFECYCLE, RUNS, TELEMETRY
from esper.streams.database.connection_types import Connection
from esper.streams.database.postgres_errors import UNAVAILABLE_ERRORS, postgres_error
from esper.streams.database.stored_positions import claim_cluster
from esper.streams.read_models.pending_boundaries import read_view_rows
from esper.streams.replay.replay_log_reader import LogReader, Offsets, open_log
from esper.streams.replay.replay_projection import (
    ProgressCallback,
    ReplayProgress,
    ReplayProjector,
    ignore_progress,
    open_replay_projector,
)
from esper.streams.replay.replay_schemas import only_replay, scratch_schema
from esper.streams.replay.skipped_records import SkippedRecords

OF_RUNS = (RUNS, LIFECYCLE, TELEMETRY)
"""A view's topics that are keyed by run; innovation.blueprints is the other one."""

BoundaryKey = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class RecomputedView:
    """One view, as the log gives it today.

    Attributes:
        view: None where the log does not hold the boundary.
        is_whole: the log surely still holds everything that it depends on, so it must be as it was.
    """

    key: BoundaryKey
    view: GraphView | None
    is_whole: bool


async def recompute_views(
    settings: Settings, wanted: Mapping[BoundaryKey, Sequence[int]], tell: ProgressCallback = ignore_progress
) -> AsyncGenerator[RecomputedView, None]:
    """The views of some boundaries, one after the other, in order. Close it (``aclosing``): its schema goes with it.

    Args:
        wanted: (run, incarnation, boundary) -> the offsets of innovation.blueprints that the view names.

    Raises:
        ConflictError: a rebuild or verify is under way.
        ConfigError, NewerVersionError, NotAllowedError, UnavailableError: as ``rebuild``.
    """
    postgres, kafka = settings.need_postgres(), settings.need_kafka()
    try:
        async with AsyncExitStack() as exits:
            live = await exits.enter_async_context(only_replay(postgres))
            reader = await exits.enter_async_context(open_log(kafka))
            schema = await exits.enter_async_context(scratch_schema(postgres, live))
            projector = await exits.enter_async_context(open_replay_projector(postgres, schema, reader, tell))
            await claim_cluster(projector.connection, await cluster_id(kafka), kafka)
            ends = await _ends(reader, {run_id for run_id, _incarnation, _boundary in wanted})
            letters = SkippedRecords(reader, projector.first)
            await letters.refresh(live)
            await letters.record_expired(projector.connection)
            await projector.replay_to(ends, letters.known)
            async with projector.connection.transaction(isolation="repeatable_read", readonly=True):
                for done, key in enumerate(sorted(wanted)):
                    yield await _see(projector, key, wanted[key])
                    tell(ReplayProgress("seeing views again", done + 1, len(wanted)))
    except UNAVAILABLE_ERRORS as error:
        raise postgres_error(error, postgres) from error


async def _ends(reader: LogReader, runs: Iterable[str]) -> Offsets:
    last = await reader.end_offsets()
    places: set[TopicPartition] = {(BLUEPRINTS.name, n) for n in range(BLUEPRINTS.num_partitions)}
    places |= {(topic.name, partition_of(run_id, topic)) for run_id in runs for topic in OF_RUNS}
    return {place: last[place] for place in places}


async def _see(projector: ReplayProjector, key: BoundaryKey, offsets: Sequence[int]) -> RecomputedView:
    run_id, incarnation, _boundary = key
    kept = [(BLUEPRINTS.name, n) for n in range(BLUEPRINTS.num_partitions)]
    kept += [(topic.name, partition_of(run_id, topic)) for topic in (RUNS, LIFECYCLE)]
    is_kept = not any(projector.first[place] for place in kept)
    try:
        view = assemble(await read_view_rows(projector.connection, *key, blueprint_offsets=offsets))
    except UnavailableError:  # of a boundary that was not folded
        return RecomputedView(key, None, is_kept)
    is_measured = projector.first[TELEMETRY.name, partition_of(run_id, TELEMETRY)] == 0
    if not is_measured:
        is_measured = await _is_measured(projector.connection, run_id, incarnation, view.window_step)
    return RecomputedView(key, view, is_kept and is_measured)


async def _is_measured(connection: Connection, run_id: str, incarnation: int, window_step: int | None) -> bool:
    """Whether the windows that a view is made of lie wholly inside a log that has lost its start.

    A run's telemetry lies in one partition, in order: if an earlier window is there, all of the later ones is.
    """
    if window_step is None:
        return True
    before = window_step - WINDOW_STEPS
    query = "SELECT EXISTS (SELECT FROM health_windows WHERE run_id = $1 AND incarnation = $2 AND step < $3)"
    return bool(await connection.fetchval(query, run_id, incarnation, before))
