"""The real tables accept every event that the contracts accept: no record that decodes can stop a partition."""

import asyncio
import uuid

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.events.contract_strategies import values_of
from support.events.event_examples import BY_TYPE

from esper.config import PostgresSettings
from esper.oona.producer import Position
from esper.schemas.events import BreakerChanged, Event, TrainerEvent
from esper.schemas.messages import OonaMessage
from esper.schemas.registry import REGISTRY
from esper.streams.projectors import PROJECTORS
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.read_models.seed_causes import causes_of_seed
from esper.streams.worker.partition_cache import PartitionCache, Progress


def cache_with(event: Event) -> PartitionCache:
    """The cache that a worker has of a run before it projects an event."""
    cache = PartitionCache()
    if isinstance(event, TrainerEvent):
        cache.progress[event.run_id, event.incarnation] = Progress()
    return cache


async def project_alone(connection: asyncpg.Connection, event: Event) -> None:
    """Project one event into empty tables, and roll back."""
    topic = REGISTRY[event.type].topic.name
    message = OonaMessage.of(event, id=uuid.uuid4(), source="test")
    transaction = connection.transaction()
    await transaction.start()
    try:
        await PROJECTORS[topic](connection, [ProjectedEvent.of(message, Position(topic, 0, 0))], cache_with(event))
    finally:
        await transaction.rollback()


@pytest.mark.timeout(120)
def test_every_decodable_event_can_be_projected(own_database: PostgresSettings) -> None:
    with asyncio.Runner() as runner:
        path = {"search_path": own_database.schema_name}
        connection = runner.run(asyncpg.connect(own_database.dsn.get_secret_value(), server_settings=path))

        @given(st.one_of(*(values_of(entry.model) for entry in REGISTRY.values())))
        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
        def projects(event: Event) -> None:
            runner.run(project_alone(connection, event))

        projects()
        runner.run(connection.close())


async def test_causes_include_breaker_changes(own_database: PostgresSettings) -> None:
    path = {"search_path": own_database.schema_name}
    connection = await asyncpg.connect(own_database.dsn.get_secret_value(), server_settings=path)
    opened = BY_TYPE["esper.seed-breaker.changed.v1"]
    assert isinstance(opened, BreakerChanged)
    tried = opened.model_copy(update={"sequence": 4, "step": 70, "from_state": "open", "to_state": "half_open"})
    messages = [OonaMessage.of(event, id=uuid.uuid4(), source="test") for event in (opened, tried)]
    topic = REGISTRY[opened.type].topic.name
    batch = [ProjectedEvent.of(message, Position(topic, 0, n)) for n, message in enumerate(messages)]
    for _twice in range(2):  # a fact is written once
        await PROJECTORS[topic](connection, batch, PartitionCache())
    causes = await causes_of_seed(connection, opened.run_id, opened.layer_id, opened.seed_id)
    assert [(c.kind, c.step, c.event_id) for c in causes] == [
        ("breaker", 40, messages[0].id),
        ("breaker", 70, messages[1].id),
    ]
    assert causes[0].description == "closed -> open (3 failures in a row): a value is not finite"
    await connection.close()
