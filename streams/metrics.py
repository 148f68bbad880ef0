"""What a worker shows to Prometheus, on a port of its own."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from esper.oona.progress import Place, Stall
from esper.streams.folding import Batch


class WorkerMetrics:
    """Counters of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._events = Counter("esper_events_folded", "New events folded", ["topic"], registry=self.registry)
        self._records = Counter("esper_records_read", "Records read", ["topic"], registry=self.registry)
        self._seconds = Histogram("esper_fold_seconds", "Time of a batch", ["topic"], registry=self.registry)
        self._red = Gauge(
            "esper_partition_red",
            "1 where a partition stopped",
            ["topic", "partition"],
            registry=self.registry,
        )
        self._stalled = Gauge(
            "esper_partition_stalled",
            "1 where a partition with records left does not get on",
            ["topic", "partition"],
            registry=self.registry,
        )
        self._server: Any = None

    def serve(self, port: int) -> int:
        """Start answering on 127.0.0.1; 0 takes a free port. Gives the port back."""
        self._server, _thread = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        return int(self._server.server_port)

    def stop(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    @contextmanager
    def folding(self, topic: str) -> Iterator[None]:
        """Times one batch."""
        with self._seconds.labels(topic).time():
            yield

    def folded(self, batch: Batch, num_events: int) -> None:
        """Counts one batch."""
        self._events.labels(batch.topic).inc(num_events)
        self._records.labels(batch.topic).inc(len(batch.records))

    def red(self, topic: str, partition: int) -> None:
        """Marks a partition as stopped."""
        self._red.labels(topic, str(partition)).set(1)

    def stalled(self, places: Iterable[Place], stalls: Iterable[Stall]) -> None:
        """Marks which of this worker's partitions do not get on."""
        stuck = {(s.topic, s.partition) for s in stalls}
        for topic, partition in places:
            self._stalled.labels(topic, str(partition)).set((topic, partition) in stuck)

    def forget(self, place: Place) -> None:
        """A partition went to another worker, which tells of it from now on."""
        topic, partition = place
        for gauge in (self._stalled, self._red):
            with contextlib.suppress(KeyError):
                gauge.remove(topic, str(partition))
