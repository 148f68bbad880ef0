"""Random batches, crashes, repeats and stale workers: the rows equal one replay from offset zero."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.faults.projection_storm import (
    ATTEMPTS,
    Attempt,
    Workers,
    delete_rows,
    open_connection,
    read_dead_letters,
    read_rows,
    replay,
)
from support.faults.random_logs import RECIPES, Recipe, make_log

from esper.config import PostgresSettings

LOGS_PER_ROUND = 15


async def assert_rows_equal_replay(
    workers: Workers, connection: Any, recipes: list[Recipe], attempts: list[Attempt], first: int, cut: int
) -> None:
    log = make_log(recipes, first)
    workers.begin(log, first)
    try:
        await workers.attempt_all(attempts)
        await workers.finish()
        live, dead_letters = await read_rows(connection), await read_dead_letters(connection)
        await delete_rows(connection)
        await replay(connection, log, first, dead_letters, cut)
        assert live == await read_rows(connection)
    finally:
        await delete_rows(connection)


@pytest.mark.timeout(600)
def test_rows_equal_replay_from_zero(own_database: PostgresSettings, request: pytest.FixtureRequest) -> None:
    num_logs = LOGS_PER_ROUND * request.config.getoption("--fault-rounds")
    with asyncio.Runner() as runner:
        connection, workers = runner.run(open_connection(own_database)), Workers(own_database)
        runner.run(workers.open())

        @seed(request.config.getoption("--fault-seed"))
        @given(RECIPES, ATTEMPTS, st.sampled_from([0, 7]), st.sampled_from([1, 2, 1000]))
        @settings(
            max_examples=num_logs, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        def holds(recipes: list[Recipe], attempts: list[Attempt], first: int, cut: int) -> None:
            runner.run(assert_rows_equal_replay(workers, connection, recipes, attempts, first, cut))

        try:
            holds()
        finally:
            runner.run(workers.close())
            runner.run(connection.close())
