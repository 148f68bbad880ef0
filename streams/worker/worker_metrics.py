"""The Prometheus metrics of a worker. Counters change per batch, never per record; lag is computed at each scrape.

Lag in records is the end of the log, as of a few seconds ago, minus the position. Lag in seconds is an upper bound of
how long the oldest record that is not projected has waited: the age of the newest projected record by its broker
timestamp or, if smaller, the time since the partition last had no lag. Both are absent while the end of the log is
unknown.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from esper.metrics import Health, Kind, Problem, ProcessMetrics
from esper.oona.progress_watch import Stall
from esper.oona.records import TopicPartition
from esper.streams.database.postgres_errors import DRIVER_ERRORS
from esper.streams.worker.batch_projection import Batch

BATCH_RECORDS = (1, 10, 50, 100, 500, 1_000, 2_500, 5_000, 10_000)
NOT_ASSIGNED = "no partition is assigned: wait for the rebalance of the consumer group"


@dataclass(slots=True)
class _Partition:
    """The progress of one partition."""

    position: int
    end: int | None = None
    newest_ms: int | None = None
    empty_at: float | None = None
    is_stalled: bool = False

    @property
    def lag(self) -> int | None:
        return None if self.end is None else max(0, self.end - self.position)


class WorkerMetrics(ProcessMetrics):
    """The metrics and the readiness of one worker.

    Args:
        now_s: seconds since 1970; the clocks of this host and the broker are expected to agree (NTP).
        clock: monotonic seconds.
    """

    def __init__(self, now_s: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic) -> None:
        self._now_s, self._clock = now_s, clock
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._stopped: dict[TopicPartition, str] = {}
        self._stalls: tuple[Stall, ...] = ()
        self._clock_skew_s = 0.0
        super().__init__("worker", Health(self._problems))
        self._create_metrics()

    def _create_metrics(self) -> None:
        meter, by_topic, by_partition = self.meter, "topic", ("topic", "partition")
        self._records = meter.counter("esper_worker_records_total", "Records that were read and handled.", by_topic)
        self._events = meter.counter("esper_worker_events_total", "New events that were projected.", by_topic)
        self._batches = meter.histogram(
            "esper_worker_batch_records", "Records in one batch.", by_topic, buckets=BATCH_RECORDS
        )
        self._batch_duration = meter.histogram(
            "esper_worker_batch_seconds", "One attempt at a batch: decoding, transaction, dead letters.", by_topic
        )
        self._transaction = meter.histogram(
            "esper_worker_transaction_seconds", "The transaction of a batch, from BEGIN to COMMIT.", by_topic
        )
        self._retries = meter.counter(
            "esper_worker_retries_total", "Batch attempts that failed and are retried, by cause.", by_topic, "cause"
        )

        def gauge(name: str, help: str, value: Callable[[TopicPartition, _Partition], float | None]) -> None:
            meter.probe(Kind.GAUGE, name, help, lambda: self._by_partition(value), *by_partition)

        gauge("esper_worker_lag_records", "Records in the log that are not projected yet.", lambda _tp, p: p.lag)
        gauge(
            "esper_worker_lag_seconds",
            "Upper bound of the age of the oldest record that is not projected yet.",
            lambda _tp, p: self._lag_s(p),
        )
        gauge("esper_worker_next_offset", "The next offset to project.", lambda _tp, p: p.position)
        gauge(
            "esper_worker_partition_stopped",
            "1 if the partition stopped: an operator has to act.",
            lambda tp, _p: tp in self._stopped,
        )
        gauge(
            "esper_worker_partition_stalled",
            "1 if the partition has records left and makes no progress.",
            lambda _tp, p: p.is_stalled,
        )
        meter.probe(
            Kind.GAUGE, "esper_worker_partitions", "Partitions assigned to this worker.", lambda: len(self._partitions)
        )

    # -- called by the process -----------------------------------------------------------------

    def partitions_assigned(self, positions: Mapping[TopicPartition, int]) -> None:
        """Replace the assigned partitions; each starts at the given offset."""
        for tp in [p for p in self._partitions if p not in positions]:
            del self._partitions[tp]
        self._stopped = {}
        for tp, position in positions.items():
            known = self._partitions.get(tp)
            if known is None or known.position != position:
                self._partitions[tp] = _Partition(position)

    @contextmanager
    def time_batch(self, topic: str) -> Iterator[None]:
        """Measure one attempt at a batch."""
        with self._batch_duration.labels(topic).time():
            yield

    def batch_projected(self, batch: Batch, num_events: int, transaction_s: float | None = None) -> None:
        """Count one projected batch."""
        self._events.labels(batch.topic).inc(num_events)
        self._records.labels(batch.topic).inc(len(batch.records))
        self._batches.labels(batch.topic).observe(len(batch.records))
        if transaction_s is not None:
            self._transaction.labels(batch.topic).observe(transaction_s)
        known = self._partitions.get((batch.topic, batch.partition))
        if known is not None and batch.records:
            known.position = max(known.position, batch.end)
            known.newest_ms = batch.records[-1].timestamp_ms
            # a timestamp in the future: the broker's clock is ahead by at least that much
            self._clock_skew_s = max(self._clock_skew_s, known.newest_ms / 1000 - self._now_s())

    def batch_retried(self, topic: str, error: BaseException) -> None:
        """Count a failed attempt that is retried."""
        self._retries.labels(topic, "postgres" if isinstance(error, DRIVER_ERRORS) else "kafka").inc()

    def partition_stopped(self, tp: TopicPartition, reason: str) -> None:
        """Mark a partition as stopped."""
        self._stopped[tp] = reason

    def update_positions(self, ends: Mapping[TopicPartition, int | None], stalls: Iterable[Stall]) -> None:
        """Update the ends of the log (None if unknown) and the stalled partitions."""
        self._stalls = tuple(stalls)
        stalled = {(s.topic, s.partition) for s in self._stalls}
        for tp, partition in self._partitions.items():
            partition.end, partition.is_stalled = ends.get(tp), tp in stalled
            if partition.lag == 0:
                partition.empty_at = self._clock()

    # -- called by Prometheus, on other threads --------------------------------------------

    def _problems(self) -> list[Problem]:
        stopped = dict(self._stopped)
        found = [Problem(reason, *tp) for tp, reason in sorted(stopped.items())]
        found += [Problem(str(s), s.topic, s.partition) for s in self._stalls if (s.topic, s.partition) not in stopped]
        return found if self._partitions else [*found, Problem(NOT_ASSIGNED)]

    def _lag_s(self, partition: _Partition) -> float | None:
        if not partition.lag:
            return partition.lag
        bounds = []
        if partition.newest_ms is not None:
            bounds.append(self._now_s() + self._clock_skew_s - partition.newest_ms / 1000)
        if partition.empty_at is not None:
            bounds.append(self._clock() - partition.empty_at)
        return max(0.0, min(bounds)) if bounds else None

    def _by_partition(
        self, value: Callable[[TopicPartition, _Partition], float | None]
    ) -> dict[tuple[str, ...], float]:
        values = {tp: value(tp, partition) for tp, partition in list(self._partitions.items())}
        return {(topic, str(number)): float(v) for (topic, number), v in values.items() if v is not None}
