"""Kills, cuts and stalls at random moments: every recorded number is applied once, in order."""

import random
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
from support.faults.broker_storm import RECOVERY_S, storm


@pytest.mark.timeout(1800)
def test_numbers_survive_a_storm(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    num_rounds, seed = request.config.getoption("--fault-rounds"), request.config.getoption("--fault-seed")
    rng = random.Random(seed)
    with storm(tmp_path, rng) as stage:
        stage.begin()
        bag: list[str] = []
        recoveries = []
        for number in range(num_rounds):
            if not bag:
                bag = rng.sample(list(stage.faults), len(stage.faults))
            recovery = stage.round(bag.pop())
            print(f"{number + 1:>3}/{num_rounds} {recovery.fault:<30} {recovery.seconds:5.1f} s", flush=True)
            recoveries.append(recovery)
        total = stage.settle()
        stage.check(total)
    seconds = defaultdict(list)
    for recovery in recoveries:
        seconds[recovery.fault].append(recovery.seconds)
    print(f"\n{num_rounds} rounds, seed {seed}: {total:,} numbers, each applied once and in order")
    print(f"{'recovery after':<32}{'rounds':>7}{'median s':>10}{'worst s':>9}")
    for fault, times in sorted(seconds.items()):
        print(f"{fault:<32}{len(times):>7}{statistics.median(times):>10.1f}{max(times):>9.1f}")
    assert max(r.seconds for r in recoveries) < RECOVERY_S
