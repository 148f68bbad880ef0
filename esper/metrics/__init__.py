"""What a process shows to Prometheus: its metrics, that it lives, and whether it is ready.

Each process has one class that makes all of its metrics (``WorkerMetrics``, ``UrzaMetrics``, ``TamiyoMetrics``,
``TrainerMetrics``), in a ``Meter`` of its own; what all of them share is in ``client_metrics``. A series that
has no value yet is absent, never 0. ``docs/deployment/monitoring.md`` lists them all.
"""

from esper.metrics.meter import Kind, Meter, MetricSpec
from esper.metrics.readiness import Health, Problem
from esper.metrics.server import MetricsServer, ProcessMetrics
from esper.metrics.settings import MetricsAddress

__all__ = ["Health", "Kind", "Meter", "MetricSpec", "MetricsAddress", "MetricsServer", "Problem", "ProcessMetrics"]
