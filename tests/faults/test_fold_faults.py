"""Whatever cut of the log, crash, repeat or stale worker: the rows are those of one replay from zero."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.faults.fold_storm import ATTEMPTS, Attempt, Workers, connected, emptied, letters_of, replayed, rows_of
from support.faults.random_logs import RECIPES, Recipe, make_log

from esper.config import PostgresSettings

LOGS_PER_ROUND = 15


async def assert_equal_to_a_replay(
    workers: Workers, judge: Any, recipes: list[Recipe], attempts: list[Attempt], first: int, cut: int
) -> None:
    log = make_log(recipes, first)
    workers.begin(log, first)
    try:
        await workers.attempt_all(attempts)
        await workers.finish()
        live, letters = await rows_of(judge), await letters_of(judge)
        await emptied(judge)
        await replayed(judge, log, first, letters, cut)
        assert live == await rows_of(judge)
    finally:
        await emptied(judge)


@pytest.mark.timeout(600)
def test_rows_equal_a_replay_from_zero(own_database: PostgresSettings, request: pytest.FixtureRequest) -> None:
    num_logs = LOGS_PER_ROUND * request.config.getoption("--fault-rounds")
    with asyncio.Runner() as runner:
        judge, workers = runner.run(connected(own_database)), Workers(own_database)
        runner.run(workers.open())

        @seed(request.config.getoption("--fault-seed"))
        @given(RECIPES, ATTEMPTS, st.sampled_from([0, 7]), st.sampled_from([1, 2, 1000]))
        @settings(
            max_examples=num_logs, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        def holds(recipes: list[Recipe], attempts: list[Attempt], first: int, cut: int) -> None:
            runner.run(assert_equal_to_a_replay(workers, judge, recipes, attempts, first, cut))

        try:
            holds()
        finally:
            runner.run(workers.close())
            runner.run(judge.close())
