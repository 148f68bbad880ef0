"""Rebuilding the projections from the log, and comparing them with what the log says.

A rebuild folds into a schema beside the live one. The swap waits for the workers' positions to
be covered and happens in one transaction: no reader ever sees missing rows, and no worker finds
a gap.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from esper.config import PostgresSettings, Settings
from esper.errors import ConflictError, DecodeError
from esper.oona.consumer import StoredRecord, beginning_offsets, read_range
from esper.oona.records import Position
from esper.oona.topics import cluster_id
from esper.schemas.topics import TOPICS, TopicSpec
from esper.streams.database import connect, connect_pool
from esper.streams.folding import NO_LETTERS, Batch, fold
from esper.streams.letters import known_letters
from esper.streams.migrations import migrate
from esper.streams.positions import claim_cluster, stored_positions

BATCH_RECORDS = 2_000
NOT_COMPARED = ("cluster", "pending_letters", "_yoyo_log", "_yoyo_migration", "_yoyo_version", "yoyo_lock")

Offsets = Mapping[tuple[str, int], int]
Letters = Mapping[Position, DecodeError]
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class TableComparison:
    """One table, live and rebuilt. ``live`` and ``rebuilt`` are (rows, hash of all rows in order)."""

    table: str
    live: tuple[int, str]
    rebuilt: tuple[int, str]

    @property
    def is_equal(self) -> bool:
        """Whether they hold the same rows."""
        return self.live == self.rebuilt


async def rebuild(settings: Settings, progress: Progress = lambda _topic, _count: None) -> int:
    """Fold the log anew, as far as workers have folded it, and put it in the place of the live projections.

    Workers may go on meanwhile; what they have not read is theirs to fold, since they write its dead
    letters. Gives the number of records folded.

    Raises:
        ConflictError: another rebuild or verify is under way.
    """
    postgres = settings.need_postgres()
    async with _scratch_schema(postgres, "rebuild") as schema, connect_pool(postgres, schema) as fresh:
        connection = await connect(postgres)
        try:
            covered = await _covered(connection, settings)
            count = await _fold_log(settings, fresh, covered, await _letters(settings), progress)
            async with connection.transaction():
                live = _quoted(postgres.schema_name)
                await connection.execute(f"LOCK TABLE {live}.positions IN EXCLUSIVE MODE")
                covered = await _covered(connection, settings)
                count += await _fold_log(settings, fresh, covered, await _letters(settings), progress)
                await connection.execute(f"INSERT INTO {_quoted(schema)}.pending_letters TABLE {live}.pending_letters")
                await connection.execute(f"DROP SCHEMA {live} CASCADE")
                await connection.execute(f"ALTER SCHEMA {_quoted(schema)} RENAME TO {live}")
        finally:
            await connection.close()
    return count


async def _covered(connection: Any, settings: Settings) -> Offsets:
    """How far the live projections are in this cluster's log; nowhere where they are of another one."""
    if not await _is_same_cluster(connection, settings):
        return {}
    return await _positions_of(connection, settings.need_postgres().schema_name)


async def verify(settings: Settings, progress: Progress = lambda _topic, _count: None) -> list[TableComparison]:
    """Fold the log up to the live positions into a schema of its own, and compare every table."""
    postgres = settings.need_postgres()
    async with (
        connect_pool(postgres) as pool,
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        positions = await stored_positions(connection)
        live = await _hashes(connection, postgres.schema_name)
    async with _scratch_schema(postgres, "verify") as schema, connect_pool(postgres, schema) as fresh:
        await _fold_log(settings, fresh, positions, await _letters(settings), progress)
        async with fresh.acquire() as connection:
            rebuilt = await _hashes(connection, schema)
    return [TableComparison(t, live.get(t, (0, "")), rebuilt.get(t, (0, ""))) for t in sorted({*live, *rebuilt})]


async def _letters(settings: Settings) -> Letters:
    """The records that live workers passed over; read after the positions that a fold goes up to."""
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        return await known_letters(connection, settings.need_kafka())


async def _fold_log(settings: Settings, pool: Any, end: Offsets, letters: Letters, progress: Progress) -> int:
    kafka, total = settings.need_kafka(), 0
    first = await beginning_offsets(kafka, TOPICS)
    async with pool.acquire() as connection:
        await claim_cluster(connection, await cluster_id(kafka), kafka)
        stored = await stored_positions(connection)
        for topic in TOPICS:
            starts = {n: stored.get((topic.name, n), first[topic.name, n]) for n in range(topic.num_partitions)}
            ends = {n: end.get((topic.name, n), 0) for n in range(topic.num_partitions)}
            async for batch in _batches(settings, topic, starts, ends):
                await fold(connection, batch, letters)
                total += len(batch.records)
                progress(topic.name, total)
            await _reach(connection, topic, starts, ends)
    return total


async def _batches(
    settings: Settings, topic: TopicSpec, starts: Mapping[int, int], ends: Mapping[int, int]
) -> AsyncIterator[Batch]:
    next_start, waiting = dict(starts), dict[int, list[StoredRecord]]()
    async for record in read_range(settings.need_kafka(), topic, start=starts, end=ends):
        partition = record.position.partition
        waiting.setdefault(partition, []).append(record)
        if len(waiting[partition]) >= BATCH_RECORDS:
            yield _batch(topic, partition, next_start, waiting.pop(partition))
    for partition, records in sorted(waiting.items()):
        yield _batch(topic, partition, next_start, records)


def _batch(topic: TopicSpec, partition: int, starts: dict[int, int], records: Sequence[StoredRecord]) -> Batch:
    batch = Batch(topic.name, partition, starts[partition], tuple(records))
    starts[partition] = batch.end
    return batch


async def _reach(connection: Any, topic: TopicSpec, starts: Mapping[int, int], ends: Mapping[int, int]) -> None:
    """Offsets at the end of a range may hold no record; the position goes past them all the same."""
    stored = await stored_positions(connection)
    for partition, end in ends.items():
        known = stored.get((topic.name, partition))
        if end > starts[partition] and (known is None or known < end):
            await fold(connection, Batch(topic.name, partition, known or starts[partition], ()), NO_LETTERS)
            await connection.execute(
                "UPDATE positions SET next_offset = $3 WHERE topic = $1 AND log_partition = $2",
                topic.name,
                partition,
                end,
            )


@asynccontextmanager
async def _scratch_schema(postgres: PostgresSettings, purpose: str) -> AsyncIterator[str]:
    schema = f"{postgres.schema_name}_{purpose}"
    connection = await connect(postgres)
    try:
        if not await connection.fetchval("SELECT pg_try_advisory_lock(hashtext($1))", schema):
            raise ConflictError(f"another {purpose} of {postgres.schema_name!r} is under way: wait for its end")
        await _drop(postgres, schema)
        migrate(postgres, schema)
        try:
            yield schema
        finally:
            await _drop(postgres, schema)
    finally:
        await connection.close()  # and with it the lock


async def _drop(postgres: PostgresSettings, schema: str) -> None:
    connection = await connect(postgres)
    try:
        await connection.execute(f"DROP SCHEMA IF EXISTS {_quoted(schema)} CASCADE")
    finally:
        await connection.close()


async def _positions_of(connection: Any, schema: str) -> dict[tuple[str, int], int]:
    rows = await connection.fetch(f"SELECT topic, log_partition, next_offset FROM {_quoted(schema)}.positions")
    return {(r["topic"], r["log_partition"]): r["next_offset"] for r in rows}


async def _is_same_cluster(connection: Any, settings: Settings) -> bool:
    schema = _quoted(settings.need_postgres().schema_name)
    known = await connection.fetchval(f"SELECT cluster_id FROM {schema}.cluster")
    return known is None or known == await cluster_id(settings.need_kafka())


async def _hashes(connection: Any, schema: str) -> dict[str, tuple[int, str]]:
    """Table -> (number of rows, MD5 over the MD5 of each row's text, in the order of the texts)."""
    await connection.execute("SET LOCAL timezone = 'UTC'")
    tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = $1", schema)
    found = {}
    for (table,) in sorted(tuple(t) for t in tables):
        if table not in NOT_COMPARED:
            row = await connection.fetchrow(
                "SELECT count(*), coalesce(md5(string_agg(md5(t::text), '' ORDER BY t::text COLLATE \"C\")), '')"
                f" FROM {_quoted(schema)}.{_quoted(table)} AS t"
            )
            found[table] = (row[0], row[1])
    return found


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
