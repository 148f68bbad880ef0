"""ProgressWatch reports the partitions that stall, and no other."""

import pytest

from esper.oona.progress_watch import ProgressWatch, Stall

PARTITION = ("runs", 3)


class Clock:
    """Seconds, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> ProgressWatch:
    watch = ProgressWatch(30, clock)
    watch.assign(PARTITION, 5)
    return watch


def test_watch_reports_a_stall_after_the_timeout(watch: ProgressWatch, clock: Clock) -> None:
    clock.now += 29.9
    assert watch.stalls({PARTITION: 9}) == []
    clock.now += 0.1
    assert watch.stalls({PARTITION: 9}) == [Stall("runs", 3, 5, 4, 30.0, "no progress")]
    assert str(watch.stalls({PARTITION: 9})[0]) == "runs[3] has been at offset 5 with a lag of 4 for 30 s: no progress"


def test_watch_restarts_the_timeout_on_progress(watch: ProgressWatch, clock: Clock) -> None:
    watch.note_problem(PARTITION, "the handler failed")
    clock.now += 29
    watch.advance(PARTITION, 6)
    clock.now += 29
    assert watch.stalls({PARTITION: 9}) == []
    clock.now += 1
    (stall,) = watch.stalls({PARTITION: 9})
    assert (stall.offset, stall.reason) == (6, "no progress")


def test_watch_ignores_a_lower_offset(watch: ProgressWatch, clock: Clock) -> None:
    clock.now += 30
    watch.advance(PARTITION, 5)
    watch.advance(PARTITION, 2)
    assert watch.stalls({PARTITION: 9})[0].offset == 5


def test_watch_reports_no_stall_without_unread_records(watch: ProgressWatch, clock: Clock) -> None:
    for _n in range(5):
        clock.now += 29
        assert watch.stalls({PARTITION: 5}) == []
    clock.now += 29
    assert watch.stalls({PARTITION: 6}) == [], "the timeout starts when it last had no unread records"
    clock.now += 1
    assert [s.lag for s in watch.stalls({PARTITION: 6})] == [1]


def test_watch_reports_an_unknown_end_as_unknown_lag(watch: ProgressWatch, clock: Clock) -> None:
    clock.now += 30
    for unknown in ({}, {PARTITION: None}):
        (stall,) = watch.stalls(unknown)
        assert stall.lag is None
        assert "an unknown lag" in str(stall)
        assert stall.reason == "no progress; no broker answers"


def test_watch_reports_the_noted_problem(watch: ProgressWatch, clock: Clock) -> None:
    watch.note_problem(PARTITION, "the handler failed")
    assert watch.stalls({PARTITION: 9}) == [], "a problem that passes in time is no stall"
    clock.now += 30
    assert watch.stalls({PARTITION: 9})[0].reason == "the handler failed"


def test_watch_reports_a_stopped_partition_at_once(watch: ProgressWatch, clock: Clock) -> None:
    watch.stop(PARTITION, "a newer version")
    for end in (9, 5, None):
        assert [s.reason for s in watch.stalls({PARTITION: end})] == ["a newer version"]
    watch.advance(PARTITION, 7)  # the batch that was in progress
    (stall,) = watch.stalls({PARTITION: 9})
    assert (stall.offset, stall.lag, stall.reason) == (7, 2, "a newer version")


def test_watch_forgets_a_revoked_partition(watch: ProgressWatch, clock: Clock) -> None:
    watch.stop(PARTITION, "a newer version")
    watch.revoke(PARTITION)
    watch.advance(PARTITION, 9)
    watch.note_problem(PARTITION, "late")
    watch.stop(PARTITION, "late")
    clock.now += 60
    assert watch.stalls({PARTITION: 9}) == []
    watch.assign(PARTITION, 9)
    assert watch.stalls({PARTITION: 12}) == []
