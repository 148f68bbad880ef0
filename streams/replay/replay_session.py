"""What every replay opens: the live connection, the log, an empty schema, and the projector into it.

Invariant: records that live workers skipped are read after the end of a range is known, so a replay of it skips
exactly what they skipped.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from esper.config import PostgresSettings, Settings
from esper.oona.admin.topics import cluster_id
from esper.streams.database.connection_types import Connection
from esper.streams.database.postgres_errors import UNAVAILABLE_ERRORS, postgres_error
from esper.streams.database.stored_positions import check_cluster, claim_cluster
from esper.streams.replay.replay_log_reader import LogReader, Offsets, open_log
from esper.streams.replay.replay_projection import ProgressCallback, ReplayProjector, open_replay_projector
from esper.streams.replay.replay_schemas import lock_replay, scratch_schema
from esper.streams.replay.skipped_records import SkippedRecords


@dataclass(frozen=True, slots=True)
class ReplaySession:
    """An open replay into ``schema``. ``live`` is a connection to the live schema."""

    postgres: PostgresSettings
    cluster_id: str
    live: Connection
    reader: LogReader
    schema: str
    projector: ReplayProjector
    skipped: SkippedRecords

    async def project_to(self, ends: Offsets) -> None:
        """Project the log up to ``ends``, as live workers did or would; see ``ReplayProjector.project_to``."""
        await self.skipped.refresh(self.live)
        await self.skipped.record_expired(self.projector.connection)
        await self.projector.project_to(ends, self.skipped.errors)


@asynccontextmanager
async def open_session(
    settings: Settings, live: Connection, reader: LogReader, schema: str, on_progress: ProgressCallback
) -> AsyncIterator[ReplaySession]:
    """Open a replay into an empty schema that the caller created."""
    postgres, kafka = settings.need_postgres(), settings.need_kafka()
    cluster = await cluster_id(kafka)
    async with open_replay_projector(postgres, schema, reader, on_progress) as projector:
        await claim_cluster(projector.connection, cluster, kafka)
        skipped = SkippedRecords(reader, projector.first)
        projector.report("reading dead letters")
        await skipped.refresh(live)  # reads almost all of them; ``project_to`` reads those that are written meanwhile
        projector.report("projecting")
        yield ReplaySession(postgres, cluster, live, reader, schema, projector, skipped)


@asynccontextmanager
async def open_scratch_session(
    settings: Settings, on_progress: ProgressCallback, *, is_same_cluster: bool = False
) -> AsyncIterator[ReplaySession]:
    """Open a replay into a scratch schema, which is dropped at the end unless it was renamed.

    Args:
        is_same_cluster: whether the live projections must come from this Kafka cluster.

    Raises:
        ConflictError: another rebuild or verification runs.
        PositionError: the live projections come from another cluster.
        NotAllowedError, UnavailableError, ConfigError: Postgres or Kafka.
    """
    postgres, kafka = settings.need_postgres(), settings.need_kafka()
    try:
        async with AsyncExitStack() as exits:
            live = await exits.enter_async_context(lock_replay(postgres))
            if is_same_cluster:
                await check_cluster(live, await cluster_id(kafka), kafka)
            reader = await exits.enter_async_context(open_log(kafka))
            schema = await exits.enter_async_context(scratch_schema(postgres, live))
            yield await exits.enter_async_context(open_session(settings, live, reader, schema, on_progress))
    except UNAVAILABLE_ERRORS as error:
        raise postgres_error(error, postgres) from error
