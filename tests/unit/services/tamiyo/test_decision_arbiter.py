"""Whose decision counts, of any number that controllers wrote in any order: "yes" only to the first for its boundary."""

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
"""Run, incarnation, boundary, and who decides (each always says the same)."""


def decision(run: int, incarnation: int, boundary: int, who: str) -> OonaMessage:
    event = DecisionMade(
        run_id=f"r{run}", incarnation=incarnation, boundary=boundary, step=boundary, action="wait", probability=0.5,
        policy_id=who, policy_version=1, reason="x", view_digest="ab" * 32,
    )  # fmt: skip
    return OonaMessage.of(event, id=UUID(int=1), source="tamiyo")


def stored(message: OonaMessage, offset: int) -> StoredRecord:
    record = encode(message)
    place = Position(DECISIONS.name, partition_of((record.key or b"").decode(), DECISIONS), offset)
    return StoredRecord(place, record.key, record.value, record.headers, 0)


@given(st.lists(st.one_of(WRITTEN, st.none()), max_size=30))
def test_the_first_in_the_log_is_known_by_its_place_and_a_resend_of_it_is_the_same(
    written: list[tuple[int, int, int, str] | None],
) -> None:
    first = DecisionArbiter(NOTHING, {})
    counted: dict[tuple[int, int, int], str] = {}
    newest: dict[int, tuple[int, int]] = {}

    async def answer(message: OonaMessage, position: Position) -> bool:
        (found,) = await first.are_first([(message, position)])
        return found

    for offset, one in enumerate(written):
        if one is None:  # nobody can read it: it counts for nobody
            broken = stored(decision(0, 1, 1, "one"), offset)
            first._read(broken._replace(value=b"{"))
            continue
        run, incarnation, boundary, who = one
        message = decision(*one)
        record = stored(message, offset)
        was_known = newest.get(run, (0, 0)) >= (incarnation, boundary)
        assert first.is_decided(f"r{run}", incarnation, boundary) == was_known
        first._read(record)
        counts_already = counted.setdefault((run, incarnation, boundary), who)
        newest[run] = max(newest.get(run, (0, 0)), (incarnation, boundary))
        found = asyncio.run(answer(message, record.position))
        if found:
            assert counts_already == who
        if newest[run] == (incarnation, boundary):
            assert found == (counts_already == who)


async def test_a_place_that_the_broker_forgot_is_no_yes() -> None:
    first = DecisionArbiter(NOTHING, {})
    message = decision(0, 1, 1, "one")
    record = stored(message, 0)
    first._read(record)
    assert await first.are_first([(message, record.position)]) == [True]
    assert await first.are_first([(message, record.position._replace(offset=-1))]) == [False]
