"""Why: the chain decision -> command -> lifecycle -> field report of a seed, from the projections."""

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
    told: str


async def causes_of_seed(connection: Connection, run_id: str, layer_id: str, seed_id: int) -> list[Cause]:
    """All that happened to a seed, in the order of the run's steps; empty where it always slept."""
    found = queries("causes").of_seed(connection, run_id=run_id, layer_id=layer_id, seed_id=seed_id)
    return [Cause(**dict(row)) async for row in found]


async def changed_seeds(connection: Connection, run_id: str) -> list[tuple[str, int]]:
    """The (layer, seed) pairs that ever moved, by their first move."""
    found = queries("causes").changed_seeds(connection, run_id=run_id)
    return [(row["layer_id"], row["seed_id"]) async for row in found]
