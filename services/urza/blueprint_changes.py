"""Changes of blueprints asked by people: many in one call, each with a verdict of its own.

For the API and the command line alike. A change is written to the log, then waited for in the projection; nothing
else writes. Invariant: the same key and the same changes have the same ids, so that asking again changes nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from esper.errors import ContractError
from esper.schemas import ids
from esper.schemas.enums import BlueprintChange, Verdict
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.messages import OonaMessage
from esper.streams.database.connection_types import Pool
from esper.streams.database.sql_queries import queries

MAX_CHANGES = 500  # of one call
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ChangeOutcome:
    """What became of one change. ``verdict`` is None where the projection has not come to it in time."""

    event_id: UUID
    blueprint_id: str
    change: BlueprintChange
    verdict: Verdict | None = None
    version_after: int | None = None


async def changes_of(
    pool: Pool, change: BlueprintChange, blueprint_ids: Sequence[str], reason: str
) -> list[BlueprintChangeRequested]:
    """The same change of many blueprints, each at the version that the projection has now.

    Raises:
        ContractError: one of them is not known.
    """
    async with pool.acquire() as connection:
        rows = queries("library").versions(connection, blueprint_ids=list(blueprint_ids))
        versions = {r["blueprint_id"]: r["version"] async for r in rows}
    unknown = sorted(set(blueprint_ids) - set(versions))
    if unknown:
        raise ContractError(f"no blueprint {', '.join(unknown)}: `esper blueprints list` names those that there are")
    return [
        BlueprintChangeRequested(
            blueprint_id=blueprint_id, change=change, expected_version=versions[blueprint_id], reason=reason
        )
        for blueprint_id in dict.fromkeys(blueprint_ids)
    ]


async def request_changes(
    producer: Any, pool: Pool, changes: Sequence[BlueprintChangeRequested], *, key: str, source: str, timeout_s: float
) -> list[ChangeOutcome]:
    """Ask for changes, and wait for their verdicts; in the same order.

    Args:
        key: an idempotency key: the n-th change of the same key is the same change.

    Raises:
        ContractError: they are too many for one call.
        UnavailableError: the log did not take them; asking again with the same key is safe.
    """
    if len(changes) > MAX_CHANGES:
        raise ContractError(f"{len(changes)} changes in one call, more than {MAX_CHANGES}: ask in several")
    event_ids = [ids.request_id(f"{key}:{n}") for n in range(len(changes))]
    await producer.send_batch(
        [OonaMessage.of(c, id=event_id, source=source) for c, event_id in zip(changes, event_ids, strict=True)]
    )
    told = await verdicts_of(pool, event_ids, timeout_s=timeout_s)
    return [
        ChangeOutcome(event_id, c.blueprint_id, c.change, *told.get(event_id, (None, None)))
        for c, event_id in zip(changes, event_ids, strict=True)
    ]


async def verdicts_of(
    pool: Pool, event_ids: Sequence[UUID], *, timeout_s: float
) -> dict[UUID, tuple[Verdict, int | None]]:
    """Event id -> (verdict, version after it), once the projection has all of them, or what it has by then."""
    deadline = time.monotonic() + timeout_s
    while True:
        async with pool.acquire() as connection:
            rows = queries("library").verdicts(connection, event_ids=list(event_ids))
            told = {r["event_id"]: (Verdict(r["verdict"]), r["version_after"]) async for r in rows}
        if len(told) == len(set(event_ids)) or time.monotonic() >= deadline:
            return told
        await asyncio.sleep(POLL_S)
