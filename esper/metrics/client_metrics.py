"""Metrics of the Kafka and S3 clients, in one meter per process.

Each process includes them with its own (``Meter.include``). All have labels, so a process that never
calls S3 has no S3 series. They are updated once per call, not per record.
"""

import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

from esper.metrics.meter import Kind, Meter

METER = Meter()
"""The meter of this process. Its metrics outlive the clients that update them."""

_records = METER.counter(
    "esper_producer_records_total",
    "Records sent to Kafka, by outcome: acknowledged, unacknowledged or refused.",
    "topic",
    "outcome",
)
_delivery = METER.histogram(
    "esper_producer_delivery_seconds", "Time from a send until Kafka has acknowledged all of its records.", "outcome"
)
_producer_retries = METER.counter(
    "esper_producer_retries_total", "Sends retried because Kafka did not acknowledge them.", "producer"
)
_dead_letters = METER.counter(
    "esper_dead_letters_total",
    "Records that could not be decoded and were sent to a dead-letter topic.",
    "topic",
    "reason",
)
_s3 = METER.histogram(
    "esper_s3_call_seconds", "Duration of a call to S3, including its retries.", "operation", "outcome"
)
_s3_retries = METER.counter("esper_s3_retries_total", "Requests to S3 that were retried.", "operation")


def show_build(meter: Meter, process: str) -> None:
    """Add ``esper_build_info``, which names the process, its version and its Python."""
    labels = (process, _esper_version(), python_version())
    meter.probe(
        Kind.GAUGE,
        "esper_build_info",
        "Always 1; the labels name the process, its version and its Python.",
        lambda: {labels: 1.0},
        "process",
        "version",
        "python",
    )


def count_send(counts: Mapping[tuple[str, str], int], seconds: float) -> None:
    """Count one send: records by (topic, outcome), and its duration."""
    for labels, count in counts.items():
        _records.labels(*labels).inc(count)
    for outcome in {outcome for _topic, outcome in counts}:
        _delivery.labels(outcome).observe(seconds)


def count_send_retry(producer: str) -> None:
    """Count a retried send; ``producer`` is control or telemetry."""
    _producer_retries.labels(producer).inc()


def count_dead_letter(topic: str, reason: str) -> None:
    """Count a dead letter; ``topic`` is the topic of the original record."""
    _dead_letters.labels(topic, reason).inc()


def instrument_s3(client: Any) -> None:
    """Time every call of a botocore client through its event hooks."""
    events = client.meta.events
    events.register("before-call.s3", _on_s3_call)
    events.register("after-call.s3", _on_s3_response)
    events.register("after-call-error.s3", _on_s3_error)


def _esper_version() -> str:
    try:
        return version("esper")
    except PackageNotFoundError:  # imported from a source tree: metrics must not stop a training run
        return "unknown"


def _on_s3_call(context: dict[str, Any], **_fields: Any) -> None:
    context["esper_start"] = time.perf_counter()


def _on_s3_response(model: Any, parsed: dict[str, Any], context: dict[str, Any], **_fields: Any) -> None:
    metadata = parsed.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode", 0))
    outcome = (
        "ok" if 200 <= status < 400 else "not_found" if status == 404 else "failed" if status >= 500 else "refused"
    )
    _count_s3_call(context, model.name, outcome, int(metadata.get("RetryAttempts", 0)))


def _on_s3_error(exception: Exception, context: dict[str, Any], event_name: str, **_fields: Any) -> None:
    attempts = int(context.get("retries", {}).get("attempt", 1))
    _count_s3_call(context, event_name.rpartition(".")[2], "failed", attempts - 1)


def _count_s3_call(context: dict[str, Any], operation: str, outcome: str, num_retries: int) -> None:
    start = context.pop("esper_start", None)
    if start is not None:
        _s3.labels(operation, outcome).observe(time.perf_counter() - start)
    if num_retries > 0:
        _s3_retries.labels(operation).inc(num_retries)
