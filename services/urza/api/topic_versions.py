"""How far each topic is projected: a response made from a topic's rows is current while this does not change.

Owns the positions that the API knows. One query serves every request that arrives within ``MAX_AGE_S``; after a
change that this process waited for, ``expire`` forces a new one, so that its requester reads its own write.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from esper.services.urza.projection_reader import ProjectionReader

MAX_AGE_S = 0.01  # of the positions that a cached response is compared with


class TopicVersions:
    """The newest known version of each topic: (identity of its tables, records projected)."""

    def __init__(self, reader: ProjectionReader) -> None:
        self._reader = reader
        self._known: dict[str, tuple[int, int]] = {}
        self._read_at = self._expired_at = float("-inf")
        self._refresh_task: asyncio.Task[None] | None = None

    @property
    def known(self) -> Mapping[str, tuple[int, int]]:
        """The result of the newest query, whatever its age."""
        return self._known

    def is_current(self, read_at: float, requested_at: float) -> bool:
        """Whether rows read at ``read_at`` are new enough for a request that arrived at ``requested_at``."""
        return read_at >= max(requested_at - MAX_AGE_S, self._expired_at)

    async def of(self, topics: Sequence[str]) -> tuple[Any, ...]:
        """A value that changes with the rows of these topics. Raises as ``ProjectionReader.all``."""
        oldest = time.monotonic() - MAX_AGE_S
        while self._read_at < max(oldest, self._expired_at):
            if self._refresh_task is None or self._refresh_task.done():
                self._refresh_task = asyncio.create_task(self._refresh(), name="urza-topic-versions")
            await asyncio.shield(self._refresh_task)
        return tuple(self._known.get(topic) for topic in topics)

    def expire(self) -> None:
        """Ignore every query that started before now."""
        self._expired_at = time.monotonic()

    async def _refresh(self) -> None:
        started = time.monotonic()
        rows = await self._reader.all("versions")
        self._known = {r["topic"]: (r["made_in"], r["total_offset"]) for r in rows}
        self._read_at = started
