"""What a worker shows to Prometheus. Counting is by batch, never by record; lag is worked out when it is asked for.

Lag in records is the end of the log, as heard a few seconds ago, less what is folded. Lag in seconds is how long the
oldest record that is not folded may have waited, at most: the age of the newest folded record by the time that the
broker wrote on it, or, where that is less, the time since the partition was last seen with nothing left. Both are
absent for a partition whose end nobody knows.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from esper.metrics import Health, Kind, Meter, MetricsServer, Problem, ProcessMetrics, client_metrics
from esper.oona.progress_watch import Stall
from esper.oona.records import TopicPartition
from esper.streams.database.postgres_errors import DRIVER_ERRORS
from esper.streams.worker.batch_projection import Batch

BATCH_RECORDS = (1, 10, 50, 100, 500, 1_000, 2_500, 5_000, 10_000)
NOT_ASSIGNED = "the group has assigned no partition to this worker yet"


@dataclass(slots=True)
class _Partition:
    """How far one partition is."""

    position: int
    end: int | None = None
    newest_ms: int | None = None
    empty_at: float | None = None
    is_stalled: bool = False

    @property
    def lag(self) -> int | None:
        return None if self.end is None else max(0, self.end - self.position)


class WorkerMetrics(ProcessMetrics):
    """The metrics of one worker, and what keeps it from being ready.

    Args:
        now_s: seconds since 1970, as the broker's clock counts them; hosts are expected to keep time (NTP).
        clock: monotonic seconds.
    """

    def __init__(self, now_s: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic) -> None:
        self._now_s, self._clock = now_s, clock
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._red: dict[TopicPartition, str] = {}
        self._stalls: tuple[Stall, ...] = ()
        self._behind_s = 0.0
        self.health = Health(self._problems)
        self.meter = self._make_meter()
        self._server = MetricsServer(self.meter.registry, self.health)

    def _make_meter(self) -> Meter:
        meter, by_topic, by_partition = Meter(), "topic", ("topic", "partition")
        client_metrics.show_build(meter, "worker")
        self._records = meter.counter("esper_worker_records_total", "Records read and dealt with.", by_topic)
        self._events = meter.counter("esper_worker_events_total", "Events folded that were new.", by_topic)
        self._batches = meter.histogram(
            "esper_worker_batch_records", "Records in one batch.", by_topic, buckets=BATCH_RECORDS
        )
        self._fold = meter.histogram(
            "esper_worker_batch_seconds", "One try at a batch: decoding, its transaction, its dead letters.", by_topic
        )
        self._transaction = meter.histogram(
            "esper_worker_transaction_seconds", "The transaction of a batch, from its begin to its commit.", by_topic
        )
        self._retries = meter.counter(
            "esper_worker_retries_total", "Batches that are tried again, by who was away.", by_topic, "cause"
        )

        def probe(name: str, help: str, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
            meter.probe(Kind.GAUGE, name, help, read, *by_partition)

        probe("esper_worker_lag_records", "Records in the log that are not folded yet.", self._lag_records)
        probe("esper_worker_lag_seconds", "How long the oldest of them may have waited, at most.", self._lag_seconds)
        probe("esper_worker_next_offset", "The offset to go on from.", self._positions)
        probe("esper_worker_partition_stopped", "1 where a partition stopped; somebody has to look at it.", self._reds)
        probe("esper_worker_partition_stalled", "1 where a partition with records left does not get on.", self._stalled)
        meter.probe(
            Kind.GAUGE, "esper_worker_partitions", "Partitions assigned to this worker.", lambda: len(self._partitions)
        )
        meter.include(client_metrics.METER)
        return meter

    # -- the process's side -----------------------------------------------------------------

    def partitions_assigned(self, positions: Mapping[TopicPartition, int]) -> None:
        """These partitions are this worker's from now on, each from this offset, and no others."""
        for place in [p for p in self._partitions if p not in positions]:
            del self._partitions[place]
        self._red = {}
        for place, position in positions.items():
            known = self._partitions.get(place)
            if known is None or known.position != position:
                self._partitions[place] = _Partition(position)

    @contextmanager
    def time_batch(self, topic: str) -> Iterator[None]:
        """Times one try at a batch."""
        with self._fold.labels(topic).time():
            yield

    def batch_projected(self, batch: Batch, num_events: int, transaction_s: float | None = None) -> None:
        """Counts one batch that was folded."""
        self._events.labels(batch.topic).inc(num_events)
        self._records.labels(batch.topic).inc(len(batch.records))
        self._batches.labels(batch.topic).observe(len(batch.records))
        if transaction_s is not None:
            self._transaction.labels(batch.topic).observe(transaction_s)
        known = self._partitions.get((batch.topic, batch.partition))
        if known is not None and batch.records:
            known.position = max(known.position, batch.end)
            known.newest_ms = batch.records[-1].timestamp_ms
            # a record dated later than now: the broker's clock is ahead by at least so much
            self._behind_s = max(self._behind_s, known.newest_ms / 1000 - self._now_s())

    def batch_retried(self, topic: str, error: BaseException) -> None:
        """Counts a batch that has to be tried again."""
        self._retries.labels(topic, "postgres" if isinstance(error, DRIVER_ERRORS) else "kafka").inc()

    def partition_stopped(self, place: TopicPartition, reason: str) -> None:
        """A partition stopped."""
        self._red[place] = reason

    def update_positions(self, ends: Mapping[TopicPartition, int | None], stalls: Iterable[Stall]) -> None:
        """Takes a look at how far each partition is: the ends of the log, and what does not get on."""
        self._stalls = tuple(stalls)
        stuck = {(s.topic, s.partition) for s in self._stalls}
        for place, partition in self._partitions.items():
            partition.end, partition.is_stalled = ends.get(place), place in stuck
            if partition.lag == 0:
                partition.empty_at = self._clock()

    # -- Prometheus's side, on threads of its own --------------------------------------------

    def _problems(self) -> list[Problem]:
        red = dict(self._red)
        found = [Problem(reason, *place) for place, reason in sorted(red.items())]
        found += [Problem(str(s), s.topic, s.partition) for s in self._stalls if (s.topic, s.partition) not in red]
        return found if self._partitions else [*found, Problem(NOT_ASSIGNED)]

    def _lag_records(self) -> dict[tuple[str, ...], float]:
        return self._by_partition(lambda p: p.lag)

    def _lag_seconds(self) -> dict[tuple[str, ...], float]:
        return self._by_partition(self._waited_s)

    def _positions(self) -> dict[tuple[str, ...], float]:
        return self._by_partition(lambda p: p.position)

    def _reds(self) -> dict[tuple[str, ...], float]:
        found: dict[tuple[str, ...], float] = {}
        for topic, number in list(self._partitions):
            found[topic, str(number)] = float((topic, number) in self._red)
        return found

    def _stalled(self) -> dict[tuple[str, ...], float]:
        return self._by_partition(lambda p: float(p.is_stalled))

    def _waited_s(self, partition: _Partition) -> float | None:
        if not partition.lag:
            return partition.lag
        bounds = []
        if partition.newest_ms is not None:
            bounds.append(self._now_s() + self._behind_s - partition.newest_ms / 1000)
        if partition.empty_at is not None:
            bounds.append(self._clock() - partition.empty_at)
        return max(0.0, min(bounds)) if bounds else None

    def _by_partition(self, value: Callable[[_Partition], float | None]) -> dict[tuple[str, ...], float]:
        found: dict[tuple[str, ...], float] = {}
        for (topic, number), partition in list(self._partitions.items()):
            read = value(partition)
            if read is not None:
                found[topic, str(number)] = float(read)
        return found
