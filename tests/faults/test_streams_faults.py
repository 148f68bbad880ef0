"""Faults of workers, Postgres and the broker while the log is written: rows equal a replay from offset zero."""

import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.conditions import wait_until
from support.faults.streams_storm import streams_storm
from support.paths import FAULT_SCRIPTS
from support.processes.esper_processes import log_of
from support.processes.small_disk import IMPORTS, with_disk
from support.stacks import LONG_FAULT_ROUNDS

from esper.embedded.processes import ChildProcess
from esper.embedded.stack import EmbeddedStack, inherited_environment
from esper.schemas.topics import TOPICS

NUM_PARTITIONS = sum(t.num_partitions for t in TOPICS)
FULL_DISK = FAULT_SCRIPTS / "full_disk_storm.py"
DISK_MB, FAULTS_PER_FULL_DISK = 400, 10
KILLS_PER_CHECK = 5
SAMPLE_RECORDS = 5_000
MAX_LAG = 4_000  # records: ten seconds of the writer, for a busy machine


@pytest.mark.timeout(3600)
def test_rows_equal_replay_after_each_fault(
    fresh_stack: EmbeddedStack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    num_rounds, seed = request.config.getoption("--fault-rounds"), request.config.getoption("--fault-seed")
    num_rounds = num_rounds if num_rounds >= LONG_FAULT_ROUNDS else num_rounds // 2
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


@pytest.mark.timeout(1800)
def test_rows_equal_replay_after_random_kills(
    fresh_stack: EmbeddedStack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    num_kills, seed = request.config.getoption("--fault-rounds"), request.config.getoption("--fault-seed")
    with streams_storm(fresh_stack, tmp_path, random.Random(seed)) as stage:
        stage.begin()
        begin_s = time.monotonic()
        for number in range(1, num_kills + 1):
            stage.kill_amid_progress()
            if number % KILLS_PER_CHECK == 0 or number == num_kills:
                seconds = stage.settle(f"{number} kills")
                print(
                    f"{number:>3}/{num_kills} kills{stage.num_aborted():>5} transactions aborted{seconds:6.1f} s"
                    f" to catch up{stage.writer.num_written:>8,} records{time.monotonic() - begin_s:6.0f} s in total",
                    flush=True,
                )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_equal_replay_after_full_disk(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    num_rounds, seed = request.config.getoption("--fault-rounds"), request.config.getoption("--fault-seed")
    with tempfile.TemporaryDirectory(prefix="esper-test-", dir="/var/tmp") as name:
        folder = Path(name)
        disk = folder / "postgres"
        disk.mkdir()
        script = (sys.executable, str(FULL_DISK), name, str(max(1, num_rounds // FAULTS_PER_FULL_DISK)), str(seed))
        child = ChildProcess(
            "full-disk",
            with_disk(disk, DISK_MB, *script),
            env={**inherited_environment(), "PYTHONPATH": IMPORTS},
            log_path=tmp_path / "full-disk.log",
            death_signal=signal.SIGTERM,
        )
        child.start()
        try:
            child.wait(1700)
        finally:
            child.stop()
        printed = log_of(child)
    print(f"\n{printed}")
    assert child.returncode == 0, printed


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_partitions_are_balanced_and_lag_bounded(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    with streams_storm(fresh_stack, tmp_path, random.Random(0)) as stage:
        for num_workers in (1, 2, 4):
            while len(stage.workers) < num_workers:
                stage.start_worker()
            wait_until(lambda n=num_workers: is_even(stage.shares(), n), 90, f"{num_workers} workers with even shares")
            lags, written, begin_s = [stage.lag()], stage.writer.num_written, time.monotonic()
            while stage.writer.num_written < written + SAMPLE_RECORDS:
                lags.append(stage.lag())
            rate = SAMPLE_RECORDS / (time.monotonic() - begin_s)
            print(
                f"{num_workers} workers: {sorted(stage.shares())} partitions; lag at most {max(lags)}, finally "
                f"{lags[-1]} of {SAMPLE_RECORDS} records, {rate:.0f} records/s"
            )
            assert max(lags) < MAX_LAG < SAMPLE_RECORDS
        stage.writer.pause()
        stage.wait_until_projected("all workers joined")
        stage.check_rows("all workers joined")


def is_even(shares: list[int], num_workers: int) -> bool:
    return len(shares) == num_workers and sum(shares) == NUM_PARTITIONS and max(shares) - min(shares) <= len(TOPICS)
