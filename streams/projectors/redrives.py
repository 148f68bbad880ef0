"""system.redrives -> redrives."""

from collections.abc import Sequence
from typing import Any

from esper.streams.projected import Projected
from esper.streams.queries import queries


async def project(connection: Any, batch: Sequence[Projected]) -> None:
    """Record what was sent again, and why."""
    for projected in batch:
        origin = {"log_partition": projected.columns["partition"], "log_offset": projected.columns["offset"]}
        await queries("letters").insert_redrive(connection, **{**projected.columns, **origin})
