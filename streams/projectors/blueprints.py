"""innovation.blueprints -> blueprints, their changes with verdicts, kernels."""

import json
from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.schemas.assets import Blueprint
from esper.schemas.enums import Verdict
from esper.schemas.verdicts import judge
from esper.streams.memory import PartitionMemory
from esper.streams.projected import Projected
from esper.streams.projectors.runs import to_json
from esper.streams.queries import queries


async def project(connection: Any, batch: Sequence[Projected], _memory: PartitionMemory) -> None:
    """Fold changes by their verdict; a request that was judged before keeps its first verdict."""
    sql = queries("blueprints")
    for projected in batch:
        match projected.data:
            case events.KernelRegistered() as event:
                await sql.insert_kernel(connection, **{**projected.columns, **event.kernel.model_dump()})
            case events.BlueprintChangeRequested() as event:
                if not await sql.is_judged(connection, event_id=projected.columns["event_id"]):
                    await _judge(connection, event, projected.columns)


async def _judge(connection: Any, event: events.BlueprintChangeRequested, columns: dict[str, Any]) -> None:
    sql = queries("blueprints")
    row = await sql.blueprint(connection, blueprint_id=event.blueprint_id)
    before = Blueprint.model_validate({**row, "spec": json.loads(row["spec"])}) if row else None
    verdict, after = judge(before, event)
    if verdict is Verdict.ACCEPTED and after is not None:
        spec = to_json(after.spec.model_dump(mode="json"))
        await sql.write_blueprint(connection, **{**columns, **after.model_dump(), "spec": spec})
    version = after.version if after else None
    await sql.insert_change(connection, **{**columns, "verdict": verdict, "version_after": version})
