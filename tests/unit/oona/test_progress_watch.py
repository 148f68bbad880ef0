"""Who does not get on is named, and nobody else."""

import pytest

from esper.oona.progress_watch import ProgressWatch, Stall

PLACE = ("runs", 3)


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
    watch.assign(PLACE, 5)
    return watch


def test_records_left_and_no_progress_is_a_stall_after_the_time_and_not_before(
    watch: ProgressWatch, clock: Clock
) -> None:
    clock.now += 29.9
    assert watch.stalls({PLACE: 9}) == []
    clock.now += 0.1
    assert watch.stalls({PLACE: 9}) == [Stall("runs", 3, 5, 4, 30.0, "no progress")]
    assert str(watch.stalls({PLACE: 9})[0]) == "runs[3] has been at offset 5 with a lag of 4 for 30 s: no progress"


def test_progress_starts_the_time_anew_and_forgets_the_trouble(watch: ProgressWatch, clock: Clock) -> None:
    watch.note_problem(PLACE, "the handler failed")
    clock.now += 29
    watch.advance(PLACE, 6)
    clock.now += 29
    assert watch.stalls({PLACE: 9}) == []
    clock.now += 1
    (stall,) = watch.stalls({PLACE: 9})
    assert (stall.offset, stall.reason) == (6, "no progress")


def test_going_back_is_no_progress(watch: ProgressWatch, clock: Clock) -> None:
    clock.now += 30
    watch.advance(PLACE, 5)
    watch.advance(PLACE, 2)
    assert watch.stalls({PLACE: 9})[0].offset == 5


def test_who_has_read_everything_waits_as_long_as_it_takes(watch: ProgressWatch, clock: Clock) -> None:
    for _n in range(5):
        clock.now += 29
        assert watch.stalls({PLACE: 5}) == []
    clock.now += 29
    assert watch.stalls({PLACE: 6}) == [], "the time counts from when it last had everything"
    clock.now += 1
    assert [s.lag for s in watch.stalls({PLACE: 6})] == [1]


def test_an_end_that_nobody_heard_of_is_no_lag_of_nothing(watch: ProgressWatch, clock: Clock) -> None:
    clock.now += 30
    for unknown in ({}, {PLACE: None}):
        (stall,) = watch.stalls(unknown)
        assert stall.lag is None
        assert "an unknown lag" in str(stall)
        assert stall.reason == "no progress; no broker answers"


def test_the_trouble_is_named(watch: ProgressWatch, clock: Clock) -> None:
    watch.note_problem(PLACE, "the handler failed")
    assert watch.stalls({PLACE: 9}) == [], "what mends itself in time is no stall"
    clock.now += 30
    assert watch.stalls({PLACE: 9})[0].reason == "the handler failed"


def test_a_stopped_partition_is_a_stall_at_once_and_stays_one(watch: ProgressWatch, clock: Clock) -> None:
    watch.stop(PLACE, "a newer version")
    for end in (9, 5, None):
        assert [s.reason for s in watch.stalls({PLACE: end})] == ["a newer version"]
    watch.advance(PLACE, 7)  # the batch that was under way
    (stall,) = watch.stalls({PLACE: 9})
    assert (stall.offset, stall.lag, stall.reason) == (7, 2, "a newer version")


def test_a_partition_that_was_given_away_is_nobodys_stall(watch: ProgressWatch, clock: Clock) -> None:
    watch.stop(PLACE, "a newer version")
    watch.revoke(PLACE)
    watch.advance(PLACE, 9)
    watch.note_problem(PLACE, "late news")
    watch.stop(PLACE, "late news")
    clock.now += 60
    assert watch.stalls({PLACE: 9}) == []
    watch.assign(PLACE, 9)
    assert watch.stalls({PLACE: 12}) == []
