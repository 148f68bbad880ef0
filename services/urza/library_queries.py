"""Reads of the library, for the API and the command line: who waits, and everything that is known of one blueprint.

Rows come as dicts; columns that hold JSON come as values.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from esper.schemas.enums import BlueprintStatus
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries

JSON_COLUMNS = frozenset({"spec", "checks", "measurements"})

Row = dict[str, Any]


class Cause(NamedTuple):
    """What of an event its effects must know; both are None where the projection has no such event."""

    id: UUID | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """One blueprint, from its proposal to what became of it in runs."""

    blueprint: Row
    changes: list[Row]
    certificates: list[Row]
    kernels: list[Row]
    refusals: list[Row]
    uses: list[Row]


def cause_of(row: Any) -> Cause:
    """The change that made the version of which a row of ``not_validated`` or ``wanted_kernels`` is."""
    return Cause(row["cause_id"], row["traceparent"])


async def unvalidated(connection: Connection, *, limit: int = 100) -> list[Row]:
    """The blueprints that wait to be examined, those that wait longest first."""
    found = queries("library").not_validated(connection, answered_ids=[], answered_versions=[], limit=limit)
    return [_plain(r) async for r in found]


async def blueprints(
    connection: Connection, *, status: BlueprintStatus | None = None, limit: int = 100, offset: int = 0
) -> list[Row]:
    """Blueprints by id; of one status, or all."""
    found = queries("library").by_status(connection, status=status, limit=limit, offset=offset)
    return [_plain(r) async for r in found]


async def versions(connection: Connection, blueprint_ids: Sequence[str]) -> list[Row]:
    """Id, version and status of those of them that there are, by id."""
    rows = queries("library").versions(connection, blueprint_ids=list(blueprint_ids))
    return sorted([_plain(r) async for r in rows], key=lambda row: str(row["blueprint_id"]))


async def certificates(connection: Connection, blueprint_id: str) -> list[Row]:
    """Its certificates, by the version that each is of."""
    found = queries("library").certificates(connection, blueprint_id=blueprint_id, after_version=-1, limit=None)
    return [_plain(r) async for r in found]


async def refusals(connection: Connection, blueprint_id: str) -> list[Row]:
    """Its kernels that cannot be built, with the reasons, by kind of layer and width."""
    found = queries("library").refusals(
        connection, blueprint_id=blueprint_id, after_target="", after_features=-1, after_version=-1, limit=None
    )
    return [_plain(r) async for r in found]


async def lineage(connection: Connection, blueprint_id: str, *, uses: int = 100, offset: int = 0) -> Lineage | None:
    """All that the projections know of a blueprint, and ``uses`` of its uses, newest first; None: there is none."""
    sql = queries("library")
    row = await sql.blueprint(connection, blueprint_id=blueprint_id)
    if row is None:
        return None
    used = sql.uses(connection, blueprint_id=blueprint_id, limit=uses, offset=offset)
    return Lineage(
        blueprint=_plain(row),
        changes=[_plain(r) async for r in sql.history(connection, blueprint_id=blueprint_id)],
        certificates=await certificates(connection, blueprint_id),
        kernels=[_plain(r) async for r in sql.kernels(connection, blueprint_id=blueprint_id)],
        refusals=await refusals(connection, blueprint_id),
        uses=[_plain(r) async for r in used],
    )


def _plain(row: Any) -> Row:
    return {k: json.loads(v) if k in JSON_COLUMNS and v is not None else v for k, v in dict(row).items()}
