"""control.tamiyo.policies -> policy_versions, policy_evaluations, policies (activations and rollbacks)."""

from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.schemas.events.policies import BY_SETTINGS, NAMED_BY
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.projectors.batched_inserts import BatchedInserts
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.projectors.runs import to_json
from esper.streams.worker.partition_cache import PartitionCache

Row = dict[str, Any]


async def project(connection: Connection, batch: Sequence[ProjectedEvent], _cache: PartitionCache) -> None:
    """Insert versions, evaluations and activations. A redriven activation counts from its event time."""
    inserts = BatchedInserts()
    for projected in batch:
        columns = projected.columns
        columns["log_offset"] = (projected.origin or projected.position).offset
        columns["since"] = columns["at"] if projected.origin else columns["logged_at"]
        match projected.data:
            case events.PolicyTrained() as event:
                data = to_json([one.model_dump() for one in event.data])
                trained = {"parameters": to_json(event.parameters), "figures": to_json(event.figures), "data": data}
                inserts.add("insert_versions", {**columns, **trained})
            case events.PolicyEvaluated() as event:
                inserts.add("insert_evaluations", {**columns, "held_out_runs": to_json(event.held_out_runs)})
            case events.PolicyActivated() as event:
                inserts.add("insert_changes", _activated(event, columns))
            case events.PolicyRolledBack() as event:
                inserts.add("insert_changes", _rolled_back(event, columns))
    await inserts.execute(connection, queries("policies"))


def _activated(event: events.PolicyActivated, columns: Row) -> Row:
    return {
        **columns,
        "change": "activated",
        "parameters": to_json(event.parameters),
        "by_settings": event.parameters.get(NAMED_BY) == BY_SETTINGS,
        "from_policy_id": None,
        "from_version": None,
    }


def _rolled_back(event: events.PolicyRolledBack, columns: Row) -> Row:
    return {
        **columns,
        "change": "rolled_back",
        "activation_id": columns["event_id"],
        "policy_id": event.to_policy_id,
        "policy_version": event.to_version,
        "from_policy_id": event.policy_id,
        "from_version": event.policy_version,
        "parameters": to_json(event.parameters),
        "by_settings": False,
    }
