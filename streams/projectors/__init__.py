"""Projectors: functions that project a batch of one partition's events into rows.

A projector gets a connection in a transaction, decoded events in log order without resends, and the partition's
cache, which is cleared if the transaction fails. It neither commits nor reads the rows of another topic.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType

from esper.schemas import topics
from esper.streams.database.connection_types import Connection
from esper.streams.projectors import blueprints, policies, redrives, runs, seeds, tamiyo, telemetry
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.worker.partition_cache import PartitionCache

Projector = Callable[[Connection, Sequence[ProjectedEvent], PartitionCache], Awaitable[None]]

PROJECTORS: Mapping[str, Projector] = MappingProxyType(
    {
        topics.TELEMETRY.name: telemetry.project,
        topics.RUNS.name: runs.project,
        topics.VIEWS.name: tamiyo.project,
        topics.DECISIONS.name: tamiyo.project,
        topics.POLICIES.name: policies.project,
        topics.COMMANDS.name: seeds.project,
        topics.LIFECYCLE.name: seeds.project,
        topics.FIELD_REPORTS.name: seeds.project,
        topics.BLUEPRINTS.name: blueprints.project,
        topics.REDRIVES.name: redrives.project,
    }
)
"""The projector of each topic."""
