"""Meter: makes the metrics of one process, in a registry of its own, and knows them all by name.

Owns the naming scheme: ``esper_<who>_<what>_<unit>``, counters end in ``_total``, time is in seconds, size in bytes.
Labels have few values, known in advance: topics, partitions, routes, stages; never a run, a layer or a message.
Invariant: a metric that is read by a probe and has no value now is absent from what Prometheus gets.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from esper.errors import InvariantError

LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of a latency's buckets, in seconds."""

Labelled = Mapping[tuple[str, ...], float]
"""Label values, in the order of the metric's labels -> its value."""
Read = Callable[[], float | Labelled | None]
"""Gives a metric's value when Prometheus asks; None, or a missing label value, where there is none."""

_NAME = re.compile(r"esper_[a-z0-9]+(_[a-z0-9]+)+")
_UNITS = ("_seconds", "_bytes", "_records")


class Kind(StrEnum):
    """Prometheus's types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric as Prometheus and its readers know it."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that its samples have."""
        if self.kind is Kind.HISTOGRAM:
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)


class Meter:
    """The metrics of one process, or of one room that several processes share."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._specs: list[MetricSpec] = []

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """What was made here, in that order."""
        return tuple(self._specs)

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        """A count that only grows; with labels, absent until it is counted for the first time."""
        self._note(name, Kind.COUNTER, help, labels)
        return Counter(name.removesuffix("_total"), help, labels, registry=self.registry)

    def gauge(self, name: str, help: str, *labels: str) -> Gauge:
        """A value that is set. Without labels it would be shown as 0 before that: use ``probe``."""
        self._note(name, Kind.GAUGE, help, labels)
        if not labels:
            raise InvariantError(f"{name} would be shown as 0 before it has a value: make it a probe")
        return Gauge(name, help, labels, registry=self.registry)

    def histogram(self, name: str, help: str, *labels: str, buckets: Sequence[float] = LATENCY_S) -> Histogram:
        """A distribution: seconds, unless the name says otherwise."""
        self._note(name, Kind.HISTOGRAM, help, labels)
        return Histogram(name, help, labels, registry=self.registry, buckets=buckets)

    def probe(self, kind: Kind, name: str, help: str, read: Read, *labels: str) -> None:
        """A value that is read when Prometheus asks for it, so that keeping it costs nothing."""
        self._note(name, kind, help, labels)
        self.registry.register(_Probe(self._specs[-1], read))

    def include(self, other: "Meter") -> None:
        """Show what another meter has as well."""
        self._specs.extend(other.specs)
        self.registry.register(other.registry)

    def _note(self, name: str, kind: Kind, help: str, labels: Sequence[str]) -> None:
        is_total = name.endswith("_total")
        if not _NAME.fullmatch(name) or is_total != (kind is Kind.COUNTER):
            raise InvariantError(
                f"{name} is no name for a {kind}: esper_<who>_<what>_<unit>, _total for counters alone"
            )
        if kind is Kind.HISTOGRAM and not name.endswith(_UNITS):
            raise InvariantError(f"{name} does not say its unit: one of {', '.join(_UNITS)}")
        self._specs.append(MetricSpec(name, kind, help, tuple(labels)))


class _Probe:
    """A collector that asks a function."""

    def __init__(self, spec: MetricSpec, read: Read) -> None:
        self._spec, self._read = spec, read

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        value = self._read()
        if value is None:
            return
        spec = self._spec
        family: Any = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
        told = family(spec.name.removesuffix("_total"), spec.help, labels=spec.labels)
        for labels, number in (value if isinstance(value, Mapping) else {(): value}).items():
            told.add_metric(labels, number)
        yield told
