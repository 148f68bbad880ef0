"""innovation.blueprints -> blueprints, blueprint_changes, certificates, kernels, kernel_refusals."""

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from esper.schemas import events
from esper.schemas.assets import Blueprint
from esper.schemas.change_verdicts import judge
from esper.schemas.enums import Verdict
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.projectors.batched_inserts import BatchedInserts, write_rows
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.projectors.runs import to_json
from esper.streams.worker.partition_cache import PartitionCache

Row = dict[str, Any]
Request = tuple[UUID, str]
"""(event, blueprint): one id in two partitions is two requests, since a row has only one partition as its source."""


async def project(connection: Connection, batch: Sequence[ProjectedEvent], _cache: PartitionCache) -> None:
    """Apply accepted changes; a request that was judged before keeps its first verdict."""
    sql, inserts = queries("blueprints"), BatchedInserts()
    blueprints, judged = await _load(connection, batch)
    written: dict[str, Row] = {}
    for projected in batch:
        columns = projected.columns
        match projected.data:
            case events.KernelRegistered() as event:
                inserts.add("insert_kernels", {**columns, **event.kernel.model_dump()})
            case events.KernelRefused():
                inserts.add("insert_kernel_refusals", columns)
            case events.CertificateIssued() as event:
                fields = event.model_dump(mode="json", include={"checks", "measurements"})
                inserts.add("insert_certificates", {**columns, **{n: to_json(v) for n, v in fields.items()}})
            case events.BlueprintChangeRequested() as event if _request(projected) not in judged:
                judged.add(_request(projected))
                verdict, after = judge(blueprints.get(event.blueprint_id), event)
                version = after.version if after else None
                inserts.add("insert_changes", {**columns, "verdict": verdict, "version_after": version})
                if verdict is Verdict.ACCEPTED and after is not None:
                    blueprints[event.blueprint_id] = after
                    spec = to_json(after.spec.model_dump(mode="json"))
                    written[event.blueprint_id] = {**after.model_dump(), "spec": spec, "at": columns["at"]}
    await inserts.execute(connection, sql)
    await write_rows(connection, sql, "upsert_blueprints", list(written.values()))


def _request(projected: ProjectedEvent) -> Request:
    event = projected.data
    assert isinstance(event, events.BlueprintChangeRequested)
    return UUID(projected.event_id), event.blueprint_id


async def _load(connection: Connection, batch: Sequence[ProjectedEvent]) -> tuple[dict[str, Blueprint], set[Request]]:
    """Read the blueprints of the batch, and which of its requests were judged before."""
    sql = queries("blueprints")
    changes = [p for p in batch if isinstance(p.data, events.BlueprintChangeRequested)]
    ids = sorted({p.data.blueprint_id for p in changes if isinstance(p.data, events.BlueprintChangeRequested)})
    rows = [dict(r) async for r in sql.blueprints_of(connection, blueprint_ids=ids)] if ids else []
    event_ids = [UUID(p.event_id) for p in changes]
    before = sql.judged_changes(connection, event_ids=event_ids)
    judged = {(r["event_id"], r["blueprint_id"]) async for r in before} if ids else set()
    found = {r["blueprint_id"]: Blueprint.model_validate({**r, "spec": json.loads(r["spec"])}) for r in rows}
    return found, judged
