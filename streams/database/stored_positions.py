"""Reads the stored positions and checks them against the log.

A position is the next offset to project. Invariant: nothing is projected from another cluster than the one whose id
is stored, nor from a log that does not hold the position.
"""

from collections.abc import Mapping

from esper.config import KafkaSettings
from esper.errors import PositionError
from esper.oona.admin.topics import cluster_id
from esper.oona.log_reader import beginning_offsets, end_offsets
from esper.oona.records import TopicPartition
from esper.schemas.topics import TOPICS
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries

REBUILD = "if the projections may be discarded, run `esper projections rebuild`, then restart the worker"


async def stored_positions(connection: Connection) -> dict[TopicPartition, int]:
    """The next offset to project, by partition."""
    rows = queries("positions").all_positions(connection)
    return {(r["topic"], r["log_partition"]): r["next_offset"] async for r in rows}


async def verify_log(connection: Connection, kafka: KafkaSettings) -> None:
    """Check that the projections come from this log and that it holds every stored position.

    Raises:
        PositionError: another cluster; a log that ends before a stored position (a wiped broker); or one that
            starts after it (records expired while no worker ran).
    """
    await claim_cluster(connection, await cluster_id(kafka), kafka)
    stored = await stored_positions(connection)
    first = await beginning_offsets(kafka, TOPICS)
    last = await end_offsets(kafka, TOPICS)
    for tp, offset in sorted(stored.items()):
        check_position(tp, offset, first, last)


async def claim_cluster(connection: Connection, found: str, kafka: KafkaSettings) -> None:
    """Store the cluster id at the first start, and refuse any other cluster later.

    Raises:
        PositionError: the projections belong to another cluster.
    """
    await queries("positions").insert_cluster(connection, cluster_id=found)
    await check_cluster(connection, found, kafka)


async def check_cluster(connection: Connection, found: str, kafka: KafkaSettings) -> None:
    """Refuse another cluster than the stored one; accept any if none is stored.

    Raises:
        PositionError: the projections belong to another cluster.
    """
    check_cluster_id(await queries("positions").cluster_id(connection), found, kafka)


def check_cluster_id(known: str | None, found: str, kafka: KafkaSettings) -> None:
    """``check_cluster`` for a stored id that was read before."""
    if known not in (None, found):
        raise PositionError(
            f"the projections come from Kafka cluster {known}, but {kafka.bootstrap_servers} is "
            f"cluster {found}: a wiped broker, or the wrong address; {REBUILD}"
        )


def check_position(
    tp: TopicPartition,
    offset: int,
    first: Mapping[TopicPartition, int],
    last: Mapping[TopicPartition, int],
) -> None:
    """Raise ``PositionError`` if ``offset`` lies outside the log.

    Args:
        first: the oldest offset of each partition; ``last`` the end of each.
    """
    topic, partition = tp
    if offset > last.get(tp, 0):
        raise PositionError(
            f"{topic}[{partition}]: the projections end at offset {offset}, the log at "
            f"{last.get(tp, 0)}: the broker lost records or was wiped; {REBUILD}"
        )
    if offset < first.get(tp, 0):
        raise PositionError(
            f"{topic}[{partition}]: offsets {offset} to {first[tp] - 1} expired before they were "
            f"projected and are lost; {REBUILD}, without them"
        )


def check_order(tp: TopicPartition, offset: int, fetched: int) -> None:
    """Raise ``PositionError`` if the broker returned a record below ``offset``."""
    topic, partition = tp
    if fetched < offset:
        raise PositionError(
            f"{topic}[{partition}]: the projections end at offset {offset}, but the broker begins again at {fetched}: "
            f"it lost records or was wiped; {REBUILD}"
        )
