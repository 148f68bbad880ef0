"""Arbitrates between controllers: the first decision in the log for a boundary counts.

Two controllers can decide the same boundary under one id and differ: they run different policy versions for a moment,
or one was paused and writes late. The command has the decision's id and a trainer applies the first one it gets, so
only the controller whose decision counts may send it. The projections hold the older decisions. The arbiter follows
control.tamiyo.decisions from there, and answers a few milliseconds after a decision was acknowledged.

Invariant: "first" is returned only for a decision before which the log has no other one for its boundary. In doubt the
answer is no; the command is sent once the projections show which decision counts.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import NamedTuple, Self

from esper.config import KafkaSettings
from esper.errors import ContractError, EsperError
from esper.logging import get_logger
from esper.oona.cloudevents import encode
from esper.oona.log_reader import StoredRecord, follow
from esper.oona.records import Position
from esper.retry import Backoff
from esper.schemas.events import DecisionMade
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import DECISIONS

MAX_RUNS = 10_000
"""Number of runs whose newest boundary is remembered. For any other run the answer is no."""

ANSWER_TIMEOUT_S = 2.0  # how long to wait for the log; a longer wait delays the next batch
RETRY_S = (0.2, 2.0)  # first and longest wait before the log is followed again after an error

_log = get_logger(__name__)


class _FirstDecision(NamedTuple):
    incarnation: int
    boundary: int
    value: bytes


class DecisionArbiter:
    """Async context manager. Follows the decisions in the log from ``start``: partition -> offset."""

    def __init__(self, kafka: KafkaSettings, start: Mapping[int, int]) -> None:
        self._kafka = kafka
        self._next = {n: start.get(n, 0) for n in range(DECISIONS.num_partitions)}
        self._newest: OrderedDict[str, _FirstDecision] = OrderedDict()
        self._advanced = asyncio.Condition()
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._following = asyncio.create_task(self._follow(), name="tamiyo-decision-arbiter")
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if self._following is not None:
            self._following.cancel()
            with suppress(asyncio.CancelledError):
                await self._following

    def is_decided(self, run_id: str, incarnation: int, boundary: int) -> bool:
        """Return whether the log has a decision for this boundary, or for a later one of its run."""
        newest = self._newest.get(run_id)
        return newest is not None and newest[:2] >= (incarnation, boundary)

    async def are_first(self, decisions: Sequence[tuple[OonaMessage, Position]]) -> list[bool]:
        """Return whether each decision, acknowledged at its position, counts for its boundary; False if unknown."""
        ends: dict[int, int] = {}
        for _decision, position in decisions:
            ends[position.partition] = max(ends.get(position.partition, 0), position.offset + 1)
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_TIMEOUT_S), self._advanced:
                await self._advanced.wait_for(lambda: all(self._next[n] >= end for n, end in ends.items()))
        return [self._is_first(decision, position) for decision, position in decisions]

    def _is_first(self, decision: OonaMessage, position: Position) -> bool:
        event = decision.data
        assert isinstance(event, DecisionMade)
        if not 0 <= position.offset < self._next[position.partition]:
            return False
        # compares values, not positions: an equal decision that was sent twice may have an earlier position
        return self._newest.get(event.run_id) == (event.incarnation, event.boundary, encode(decision).value)

    async def _follow(self) -> None:
        backoff = Backoff(*RETRY_S)
        while True:
            try:
                async with aclosing(follow(self._kafka, DECISIONS, start=dict(self._next))) as records:
                    async for record in records:
                        self._read(record)
                        backoff.reset()
                        async with self._advanced:
                            self._advanced.notify_all()
            except (EsperError, OSError) as error:
                _log.warning("decision_log.read_failed", error=str(error))
            await backoff.wait()

    def _read(self, record: StoredRecord) -> None:
        self._next[record.position.partition] = record.position.offset + 1
        try:
            event = record.decode().data
        except ContractError:
            return  # a dead letter in the projections: it counts for no boundary
        if not isinstance(event, DecisionMade):
            return
        newest = self._newest.get(event.run_id)
        if newest is None or newest[:2] < (event.incarnation, event.boundary):
            self._newest[event.run_id] = _FirstDecision(event.incarnation, event.boundary, record.value or b"")
        self._newest.move_to_end(event.run_id)
        if len(self._newest) > MAX_RUNS:
            self._newest.popitem(last=False)
