"""What the contracts let through, the real tables take: no record that decodes can stop a partition."""

import asyncio
import uuid

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import values_of

from esper.config import PostgresSettings
from esper.oona.producer import Position
from esper.schemas.events import Event
from esper.schemas.messages import OonaMessage
from esper.schemas.registry import REGISTRY
from esper.streams.projected import Projected
from esper.streams.projectors import PROJECTORS


async def fold_alone(connection: asyncpg.Connection, event: Event) -> None:
    """Fold one event into tables that are empty, and take it back."""
    topic = REGISTRY[event.type].topic.name
    message = OonaMessage.of(event, id=uuid.uuid4(), source="test")
    transaction = connection.transaction()
    await transaction.start()
    try:
        await PROJECTORS[topic](connection, [Projected(message, Position(topic, 0, 0))])
    finally:
        await transaction.rollback()


@pytest.mark.timeout(120)
def test_whatever_decodes_can_be_folded(own_database: PostgresSettings) -> None:
    with asyncio.Runner() as runner:
        path = {"search_path": own_database.schema_name}
        connection = runner.run(asyncpg.connect(own_database.dsn.get_secret_value(), server_settings=path))

        @given(st.one_of(*(values_of(entry.model) for entry in REGISTRY.values())))
        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
        def folds(event: Event) -> None:
            runner.run(fold_alone(connection, event))

        folds()
        runner.run(connection.close())
