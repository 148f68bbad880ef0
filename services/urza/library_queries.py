"""Reads of the library for the command line, the certifier and the kernel builder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from esper.schemas.enums import BlueprintStatus
from esper.services.urza.projection_reader import ProjectionReader, Row

LIBRARY = "library"  # the .sql file


class Cause(NamedTuple):
    """The id and the trace of the event that caused another; both are None where the projection does not have it."""

    id: UUID | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """One blueprint from its proposal to its outcomes in runs."""

    blueprint: Row
    changes: list[Row]
    certificates: list[Row]
    kernels: list[Row]
    refusals: list[Row]
    uses: list[Row]


def cause_of(row: Row) -> Cause:
    """The change that made the blueprint version in a row of ``unvalidated`` or ``wanted_kernels``."""
    return Cause(row["cause_id"], row["traceparent"])


async def unvalidated(
    reader: ProjectionReader, *, limit: int, answered_ids: Sequence[str] = (), answered_versions: Sequence[int] = ()
) -> list[Row]:
    """The blueprints that wait for their examination, longest first, without these versions."""
    return await reader.all(
        "not_validated", sql_file=LIBRARY, answered_ids=answered_ids, answered_versions=answered_versions, limit=limit
    )


async def blueprints(reader: ProjectionReader, *, status: BlueprintStatus | None, limit: int) -> list[Row]:
    """Blueprints by id; of one status, or all."""
    return await reader.all("by_status", sql_file=LIBRARY, status=status, limit=limit, offset=0)


async def versions(reader: ProjectionReader, blueprint_ids: Sequence[str]) -> list[Row]:
    """Id, version and status of the blueprints that exist, by id."""
    rows = await reader.all("versions", sql_file=LIBRARY, blueprint_ids=list(blueprint_ids))
    return sorted(rows, key=lambda row: str(row["blueprint_id"]))


async def wanted_kernels(reader: ProjectionReader, *, limit: int) -> list[Row]:
    """The kernels of certified blueprints, at the widths of all runs, that are neither registered nor refused."""
    return await reader.all("wanted_kernels", sql_file=LIBRARY, limit=limit)


async def lineage(reader: ProjectionReader, blueprint_id: str, *, max_uses: int = 100) -> Lineage | None:
    """All that the projections have on a blueprint, with its newest uses; None where it does not exist."""

    async def rows(name: str, **parameters: Any) -> list[Row]:
        return await reader.all(name, sql_file=LIBRARY, blueprint_id=blueprint_id, **parameters)

    blueprint = await rows("blueprint")
    if not blueprint:
        return None
    return Lineage(
        blueprint=blueprint[0],
        changes=await rows("history"),
        certificates=await rows("certificates", after_version=-1, limit=None),
        kernels=await rows("kernels"),
        refusals=await rows("refusals", after_target="", after_features=-1, after_version=-1, limit=None),
        uses=await rows("uses", limit=max_uses, offset=0),
    )
