"""Of any number of decisions by several controllers, only the first in the log for a boundary counts."""

import asyncio
from typing import Any
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from esper.oona.cloudevents import encode
from esper.oona.log_reader import StoredRecord, partition_of
from esper.oona.records import Position
from esper.schemas.events import DecisionMade
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import DECISIONS
from esper.services.tamiyo.control.decision_arbiter import DecisionArbiter

NOTHING: Any = None
WRITTEN = st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(1, 4), st.sampled_from(["one", "other"]))
"""Run, incarnation, boundary, and the controller; each controller always decides the same."""


def decision(run: int, incarnation: int, boundary: int, controller: str) -> OonaMessage:
    event = DecisionMade(
        run_id=f"r{run}", incarnation=incarnation, boundary=boundary, step=boundary, action="wait", probability=0.5,
        policy_id=controller, policy_version=1, reason="x", view_digest="ab" * 32,
    )  # fmt: skip
    return OonaMessage.of(event, id=UUID(int=1), source="tamiyo")


def stored(message: OonaMessage, offset: int) -> StoredRecord:
    record = encode(message)
    place = Position(DECISIONS.name, partition_of((record.key or b"").decode(), DECISIONS), offset)
    return StoredRecord(place, record.key, record.value, record.headers, 0)


@given(st.lists(st.one_of(WRITTEN, st.none()), max_size=30))
def test_first_decision_counts_and_its_duplicate_too(
    written: list[tuple[int, int, int, str] | None],
) -> None:
    arbiter = DecisionArbiter(NOTHING, {})
    counted: dict[tuple[int, int, int], str] = {}
    newest: dict[int, tuple[int, int]] = {}

    async def answer(message: OonaMessage, position: Position) -> bool:
        (found,) = await arbiter.are_first([(message, position)])
        return found

    for offset, one in enumerate(written):
        if one is None:  # cannot be decoded: it counts for no boundary
            broken = stored(decision(0, 1, 1, "one"), offset)
            arbiter._read(broken._replace(value=b"{"))
            continue
        run, incarnation, boundary, controller = one
        message = decision(*one)
        record = stored(message, offset)
        was_known = newest.get(run, (0, 0)) >= (incarnation, boundary)
        assert arbiter.is_decided(f"r{run}", incarnation, boundary) == was_known
        arbiter._read(record)
        counting = counted.setdefault((run, incarnation, boundary), controller)
        newest[run] = max(newest.get(run, (0, 0)), (incarnation, boundary))
        found = asyncio.run(answer(message, record.position))
        if found:
            assert counting == controller
        if newest[run] == (incarnation, boundary):
            assert found == (counting == controller)


async def test_unknown_offset_is_never_first() -> None:
    arbiter = DecisionArbiter(NOTHING, {})
    message = decision(0, 1, 1, "one")
    record = stored(message, 0)
    arbiter._read(record)
    assert await arbiter.are_first([(message, record.position)]) == [True]
    assert await arbiter.are_first([(message, record.position._replace(offset=-1))]) == [False]
