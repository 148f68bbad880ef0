"""Finds the blobs that projections and dead letters reference.

Two kinds of reference: a column with ``sha256`` in its name (a new table needs no change here) names a blob that must
be in S3; any other text that looks like a SHA-256 (in JSON, in a dead letter) only protects a blob from collection.

Invariant: the answer is complete only after ``wait_until_projected``.
"""

import asyncio
import re
import time
from collections.abc import Mapping

from esper.config import KafkaSettings
from esper.errors import PositionError, UnavailableError
from esper.oona.admin.topics import cluster_id
from esper.oona.dead_letters.redrive import find_dead_letters
from esper.oona.log_reader import beginning_offsets, end_offsets
from esper.schemas.topics import TELEMETRY, TOPICS, VIEWS
from esper.storage.blob_inspection import BlobName
from esper.storage.blob_keys import SHA256, BlobKind
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.database.stored_positions import check_cluster_id, check_position, stored_positions

BLOB_TOPICS = tuple(t for t in TOPICS if t not in (TELEMETRY, VIEWS))
"""The topics whose events may reference a blob."""

POLL_S = 0.2
_HASH_IN_BYTES = re.compile(SHA256.pattern.encode())
_KINDS: Mapping[str, BlobKind] = {
    "checkpoints": BlobKind.CHECKPOINT,
    "policy_versions": BlobKind.POLICY,
}


async def referenced_blobs(connection: Connection) -> dict[BlobName, set[str]]:
    """Every blob that the projections reference, with the referencing columns (``table.column``)."""
    found: dict[BlobName, set[str]] = {}
    for table, column in await _columns(connection, "sha256"):
        for (digest,) in await connection.fetch(f'SELECT DISTINCT "{column}" FROM "{table}" WHERE "{column}" <> \'\''):
            if SHA256.fullmatch(digest):
                kind = _KINDS.get(table, BlobKind.KERNEL)
                found.setdefault((kind, digest), set()).add(f"{table}.{column}")
    return found


async def mentioned_digests(connection: Connection, kafka: KafkaSettings) -> set[str]:
    """Every text that looks like a SHA-256 in the projections' JSON and in the dead letters."""
    found: set[str] = set()
    for table, column in await _columns(connection, "jsonb"):
        rows = await connection.fetch(
            f"SELECT DISTINCT (regexp_matches(\"{column}\"::text, '{SHA256.pattern}', 'g'))[1] FROM \"{table}\""
        )
        found |= {digest for (digest,) in rows}
    values = [value for (value,) in await connection.fetch("SELECT value FROM pending_letters")]
    values += [letter.record.value async for letter in find_dead_letters(kafka, BLOB_TOPICS)]
    for value in values:
        found |= {digest.decode() for digest in _HASH_IN_BYTES.findall(value or b"")}
    return found


async def wait_until_projected(connection: Connection, kafka: KafkaSettings, timeout_s: float) -> None:
    """Wait until the projections hold every event that is in the log at the time of the call.

    Raises:
        PositionError: nothing was projected, the projections come from another cluster, or the log does not hold
            a stored position.
        UnavailableError: the projections are still behind after ``timeout_s``.
    """
    known, here = await queries("positions").cluster_id(connection), await cluster_id(kafka)
    if known is None:
        raise PositionError("the projections are empty, no worker ever ran: start one, and wait until it has caught up")
    check_cluster_id(known, here, kafka)
    stored = await stored_positions(connection)  # read before the log's ends: a position beyond them means lost records
    first, last = await beginning_offsets(kafka, BLOB_TOPICS), await end_offsets(kafka, BLOB_TOPICS)
    for tp in sorted(stored.keys() & last.keys()):
        check_position(tp, stored[tp], first, last)
    deadline = time.monotonic() + timeout_s
    while True:
        behind = {p: last[p] - stored.get(p, first[p]) for p in last}
        lag = sum(n for n in behind.values() if n > 0)
        if not lag:
            return
        if time.monotonic() > deadline:
            topics = ", ".join(sorted({topic for (topic, _n), count in behind.items() if count > 0}))
            raise UnavailableError(
                f"the projections are {lag:,} events behind the log ({topics}), and any of these may reference a blob; "
                "start a worker, or wait (`esper projections status` shows the lag)"
            )
        await asyncio.sleep(POLL_S)
        stored = await stored_positions(connection)


async def _columns(connection: Connection, kind: str) -> list[tuple[str, str]]:
    """(table, column) of the live schema: text columns named ``sha256``, or columns of type ``jsonb``."""
    condition = "data_type = 'jsonb'" if kind == "jsonb" else "data_type = 'text' AND column_name LIKE '%sha256%'"
    rows = await connection.fetch(
        "SELECT table_name, column_name FROM information_schema.columns JOIN information_schema.tables"
        " USING (table_schema, table_name) WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'"
        f" AND {condition} ORDER BY 1, 2"
    )
    return [(r["table_name"], r["column_name"]) for r in rows]
