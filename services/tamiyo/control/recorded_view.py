"""The view that a decision was made of, read from the log again.

A command that is sent after a death must say what the decision saw: the kernel that was offered then, and the stage
that the seed had. Meanwhile other kernels may have come, and the seed may have moved.
"""

from contextlib import aclosing

import zstandard

from esper.config import KafkaSettings
from esper.errors import ContractError, DecodeError
from esper.graph.graph_view import GraphView, digest_of
from esper.oona.log_reader import StoredRecord, read_range
from esper.schemas.events import ViewRecorded
from esper.schemas.topics import VIEWS
from esper.streams.read_models.pending_boundaries import UncommandedDecision

LOOK_AHEAD = 200
"""Rivals record a view each for one boundary, and the projections name the first; others are among so many after it."""


async def seen_view(kafka: KafkaSettings, undone: UncommandedDecision) -> GraphView | None:
    """What the decision saw; None where the log does not hold it, or not whole.

    Raises:
        UnavailableError, NotAllowedError: Kafka does not give it now.
    """
    first = undone.view_offset
    start, end = {undone.view_partition: first}, {undone.view_partition: first + LOOK_AHEAD}
    async with aclosing(read_range(kafka, VIEWS, partition=undone.view_partition, start=start, end=end)) as records:
        async for record in records:
            view = _view_in(record, undone.view_digest)
            if view is not None:
                return view
    return None


def _view_in(record: StoredRecord, digest: str) -> GraphView | None:
    try:
        event = record.decode().data
        if not isinstance(event, ViewRecorded) or event.digest != digest:
            return None
        data = zstandard.decompress(event.view_zstd)
        return GraphView.from_bytes(data) if digest_of(data) == digest else None
    except (DecodeError, ContractError, zstandard.ZstdError, ValueError):
        return None
