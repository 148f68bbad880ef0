"""Reads the chain of causes of a seed: decision -> command -> transitions -> field report."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries


@dataclass(frozen=True, slots=True)
class Cause:
    """One link of the chain. ``causation_id`` is the ``event_id`` of the link that caused it."""

    at: datetime
    kind: str
    incarnation: int
    step: int
    event_id: UUID
    causation_id: UUID | None
    description: str


async def causes_of_seed(connection: Connection, run_id: str, layer_id: str, seed_id: int) -> list[Cause]:
    """Every event of a seed, in step order; empty for a seed that never left DORMANT."""
    found = queries("causes").of_seed(connection, run_id=run_id, layer_id=layer_id, seed_id=seed_id)
    return [Cause(**dict(row)) async for row in found]


async def changed_seeds(connection: Connection, run_id: str) -> list[tuple[str, int]]:
    """The (layer, seed) pairs with a transition, sorted by the step of the first one."""
    found = queries("causes").changed_seeds(connection, run_id=run_id)
    return [(row["layer_id"], row["seed_id"]) async for row in found]
