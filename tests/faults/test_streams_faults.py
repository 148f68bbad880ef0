"""Whatever happens to workers, Postgres and the broker while the log is written: rows equal a replay from zero."""

import random
from pathlib import Path

import pytest
from faults.streams_storm import streams_storm

from esper.embedded.stack import EmbeddedStack


@pytest.mark.timeout(3600)
def test_rows_equal_a_replay_after_each_fault(
    fresh_stack: EmbeddedStack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    num_rounds, seed = request.config.getoption("--fault-rounds"), request.config.getoption("--fault-seed")
    rng = random.Random(seed)
    print(f"\nseed {seed} (--fault-seed)")
    with streams_storm(fresh_stack, tmp_path, rng) as stage:
        stage.begin()
        bag: list[str] = []
        for number in range(num_rounds):
            bag = bag or rng.sample(list(stage.faults), len(stage.faults))
            recovery = stage.round(bag.pop())
            print(
                f"{number + 1:>3}/{num_rounds} {recovery.fault:<34}{recovery.seconds:6.1f} s"
                f"{recovery.num_written:>8,} records",
                flush=True,
            )
        print(f"{stage.writer.num_written:,} records, rows equal to a replay after each of {num_rounds} faults")
