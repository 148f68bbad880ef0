"""Metrics, liveness and readiness of a process, served over HTTP for Prometheus and orchestrators.

Each process has one class with all of its metrics (``WorkerMetrics``, ``UrzaMetrics``,
``TamiyoMetrics``, ``TrainerMetrics``) in its own ``Meter``; ``client_metrics`` holds those that all
processes share. A series without a value is absent, never 0. ``esper metrics docs`` prints every
metric.

Public names:

- ``Meter`` creates metrics and checks their names; ``MetricSpec`` and ``Kind`` describe one.
- ``Health`` answers whether a process is live and ready; a ``Problem`` is a reason why it is not ready.
- ``MetricsServer`` serves both, at a ``MetricsAddress``; ``ProcessMetrics`` is the base class of each
  process's metrics.
"""

from esper.metrics.meter import Kind, Meter, MetricSpec
from esper.metrics.readiness import Health, Problem
from esper.metrics.server import MetricsServer, ProcessMetrics
from esper.metrics.settings import MetricsAddress

__all__ = ["Health", "Kind", "Meter", "MetricSpec", "MetricsAddress", "MetricsServer", "Problem", "ProcessMetrics"]
