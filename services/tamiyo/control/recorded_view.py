"""Recorded views: how a view is packed for the log, unpacked and verified, and read from the log again.

Invariant: a view that is returned has the digest that its decision names.
"""

import base64
from contextlib import aclosing

import zstandard

from esper.config import KafkaSettings
from esper.errors import ContractError, DecodeError, NewerVersionError
from esper.graph.graph_view import GraphView, digest_of
from esper.oona.log_reader import read_range
from esper.schemas.events import ViewRecorded
from esper.schemas.topics import VIEWS
from esper.streams.read_models.pending_boundaries import UncommandedDecision

MAX_VIEW_BYTES = 256 * 1024 * 1024
"""Limit of a view's uncompressed size. A frame that claims more is not decompressed: Esper writes no such view."""

MAX_DETAIL_CHARS = 200

MAX_RECORDS = 200
"""Records that are read after the first view of a boundary. Each controller records a view; the projections keep the
offset of the first one."""


def pack_view(view: GraphView) -> bytes:
    """Return a view's bytes compressed and in Base64, as ``ViewRecorded`` takes them."""
    return base64.b64encode(zstandard.compress(view.to_bytes()))


def unpack_view(view_zstd: bytes, digest: str) -> GraphView:
    """Decompress a view and verify its digest.

    Raises:
        NewerVersionError: a newer program wrote it.
        ContractError: it is too large, damaged, or has another digest.
    """
    try:
        num_bytes = zstandard.get_frame_parameters(view_zstd).content_size
        if num_bytes > MAX_VIEW_BYTES:
            raise ContractError(f"it claims to have {num_bytes:,} bytes, the limit is {MAX_VIEW_BYTES:,}")
        data = zstandard.decompress(view_zstd)
        if digest_of(data) != digest:
            raise ContractError(f"its bytes have digest {digest_of(data)[:12]}, expected {digest[:12]}")
        return GraphView.from_bytes(data)
    except NewerVersionError:
        raise
    except (zstandard.ZstdError, ContractError, ValueError) as error:
        raise ContractError(str(error)[:MAX_DETAIL_CHARS]) from None


async def read_recorded_view(kafka: KafkaSettings, decision: UncommandedDecision) -> GraphView | None:
    """Read the view that a decision names; None if the log does not hold it, or only a damaged one.

    The command of a decision must name the kernel and the stage that the decision was based on. Newer kernels may have
    been certified since, and the seed may have advanced.

    Raises:
        UnavailableError, NotAllowedError: Kafka is away or refuses.
    """
    partition, first = decision.view_partition, decision.view_offset
    start, end = {partition: first}, {partition: first + MAX_RECORDS}
    async with aclosing(read_range(kafka, VIEWS, partition=partition, start=start, end=end)) as records:
        async for record in records:
            try:
                event = record.decode().data
                if isinstance(event, ViewRecorded) and event.digest == decision.view_digest:
                    return unpack_view(event.view_zstd, event.digest)
            except (DecodeError, ContractError):
                continue
    return None
