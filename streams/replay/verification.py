"""Proves that the live rows are what the log says: folds it up to the live positions beside them, and compares."""

from contextlib import AsyncExitStack

from esper.config import Settings
from esper.oona.admin.topics import cluster_id
from esper.streams.database.postgres_errors import UNAVAILABLE_ERRORS, postgres_error
from esper.streams.database.stored_positions import check_cluster, claim_cluster, stored_positions
from esper.streams.replay.projection_rebuild import compare_at, frozen_connection
from esper.streams.replay.replay_log_reader import open_log
from esper.streams.replay.replay_projection import ProgressCallback, ignore_progress, open_replay_projector
from esper.streams.replay.replay_schemas import only_replay, scratch_schema
from esper.streams.replay.row_comparison import TableComparison
from esper.streams.replay.skipped_records import SkippedRecords


async def verify(
    settings: Settings, tell: ProgressCallback = ignore_progress, num_shown: int = 0
) -> list[TableComparison]:
    """Compare every table as it is at one moment; workers and readers may go on meanwhile.

    What the log does not hold any more is not compared (``esper.streams.replay.expired_ranges`` has the rules).

    Args:
        num_shown: how many differing rows to find in each table, at most.

    Raises:
        ConflictError: another rebuild or verify is under way.
        PositionError: the projections were folded from another cluster.
        NewerVersionError, NotAllowedError, UnavailableError, ConfigError: as ``rebuild``.
    """
    postgres, kafka = settings.need_postgres(), settings.need_kafka()
    try:
        async with AsyncExitStack() as exits:
            live = await exits.enter_async_context(only_replay(postgres))
            await check_cluster(live, await cluster_id(kafka), kafka)
            reader = await exits.enter_async_context(open_log(kafka))
            schema = await exits.enter_async_context(scratch_schema(postgres, live))
            projector = await exits.enter_async_context(open_replay_projector(postgres, schema, reader, tell))
            await claim_cluster(projector.connection, await cluster_id(kafka), kafka)
            seen = await exits.enter_async_context(frozen_connection(postgres))
            ends = await stored_positions(seen)
            letters = SkippedRecords(reader, projector.first)
            projector.say("reading dead letters")
            await letters.refresh(live)
            await letters.record_expired(projector.connection)
            projector.say("folding")
            await projector.replay_to(ends, letters.known)
            return list(await compare_at(seen, postgres.schema_name, projector, schema, reader, num_shown))
    except UNAVAILABLE_ERRORS as error:
        raise postgres_error(error, postgres) from error
