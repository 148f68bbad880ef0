"""Creates the metrics of one process in its own registry, and checks their names.

This module owns the naming scheme, which follows Prometheus: ``esper_<process>_<what>_<unit>``,
counters end in ``_total``, time is in seconds, size in bytes. Labels have few values, known in
advance: topics, partitions, routes, stages; never a run, a layer or a message. Invariant: a probe
without a value is absent from a scrape.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from esper.errors import InvariantError

LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of a latency histogram, in seconds."""

Labelled = Mapping[tuple[str, ...], float]
"""Label values, in the order of the metric's labels -> value."""
Read = Callable[[], float | Labelled | None]
"""Returns a metric's value at a scrape. None, or a missing label value, if there is no value."""

_NAME = re.compile(r"esper_[a-z0-9]+(_[a-z0-9]+)+")
_UNITS = ("_seconds", "_bytes", "_records")


class Kind(StrEnum):
    """Metric types of Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """Name, type, help text and labels of a metric."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


class Meter:
    """The metrics of one process, or of one package that several processes use."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._specs: list[MetricSpec] = []

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """All metrics of this meter, in the order of their creation."""
        return tuple(self._specs)

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        """A count that only grows. With labels, a series is absent until its first increment."""
        self._register_spec(name, Kind.COUNTER, help, labels)
        return Counter(name.removesuffix("_total"), help, labels, registry=self.registry)

    def histogram(self, name: str, help: str, *labels: str, buckets: Sequence[float] = LATENCY_S) -> Histogram:
        """A distribution, of seconds unless its name has another unit."""
        self._register_spec(name, Kind.HISTOGRAM, help, labels)
        return Histogram(name, help, labels, registry=self.registry, buckets=buckets)

    def probe(self, kind: Kind, name: str, help: str, read: Read, *labels: str) -> None:
        """A value that ``read`` returns at each scrape, so that it costs nothing between scrapes."""
        self._register_spec(name, kind, help, labels)
        self.registry.register(_Probe(self._specs[-1], read))

    def include(self, other: "Meter") -> None:
        """Serve another meter's metrics together with these."""
        self._specs.extend(other.specs)
        self.registry.register(other.registry)

    def _register_spec(self, name: str, kind: Kind, help: str, labels: Sequence[str]) -> None:
        is_total = name.endswith("_total")
        if not _NAME.fullmatch(name) or is_total != (kind is Kind.COUNTER):
            raise InvariantError(
                f"{name} is not a valid {kind} name; use esper_<process>_<what>_<unit>, with _total for counters only"
            )
        if kind is Kind.HISTOGRAM and not name.endswith(_UNITS):
            raise InvariantError(f"{name}: the unit is missing; end the name in one of {', '.join(_UNITS)}")
        self._specs.append(MetricSpec(name, kind, help, tuple(labels)))


class _Probe:
    """A collector that reads its value from a function."""

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
        metric = family(spec.name.removesuffix("_total"), spec.help, labels=spec.labels)
        for labels, number in (value if isinstance(value, Mapping) else {(): value}).items():
            metric.add_metric(labels, number)
        yield metric
