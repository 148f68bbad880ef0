"""Projectors: plain functions that fold a batch of one partition's events into rows.

Each takes a connection inside a transaction and events in the order of the log; it neither
commits nor looks at another topic's rows. What arrives here is decoded, and is no resend. The memory
is the partition's; what a projector puts there is dropped when the transaction fails.
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
"""Topic -> its projector."""
