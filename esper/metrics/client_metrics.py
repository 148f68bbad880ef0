"""What every process that writes to Kafka or talks to S3 counts about it, in one meter of the process.

A process shows these beside its own (``Meter.include``). All of them have labels, so that one that never talked to S3
has no series of S3. Counting is by call, never by record.
"""

import time
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

from esper.metrics.meter import Kind, Meter

ABSENT_VERSION = "unknown"

METER = Meter()
"""Of this process. Its metrics live as long as the process, whoever opens and closes clients."""

_records = METER.counter(
    "esper_producer_records_total", "Records handed to Kafka, by what became of them.", "topic", "outcome"
)
_delivery = METER.histogram(
    "esper_producer_delivery_seconds", "From a send to Kafka's acknowledgement of all its records.", "outcome"
)
_producer_retries = METER.counter(
    "esper_producer_retries_total", "Sends that were tried again because Kafka had not taken them.", "lane"
)
_letters = METER.counter(
    "esper_dead_letters_total", "Records that could not be decoded and went to the dead letters.", "topic", "reason"
)
_s3 = METER.histogram("esper_s3_call_seconds", "One call to S3, with its retries.", "operation", "outcome")
_s3_retries = METER.counter("esper_s3_retries_total", "Requests to S3 that were sent again.", "operation")


def show_build(meter: Meter, process: str) -> None:
    """Have a process say what it is."""
    labels = (process, esper_version(), python_version())
    meter.probe(
        Kind.GAUGE,
        "esper_build_info",
        "1, for the program that runs here.",
        lambda: {labels: 1.0},
        "process",
        "version",
        "python",
    )


@lru_cache(1)
def esper_version() -> str:
    """The installed version."""
    try:
        return version("esper")
    except PackageNotFoundError:
        return ABSENT_VERSION


def count_send(counts: Mapping[tuple[str, str], int], seconds: float) -> None:
    """Count one send, by the (topic, outcome) of its records."""
    for labels, count in counts.items():
        _records.labels(*labels).inc(count)
    for outcome in {outcome for _topic, outcome in counts}:
        _delivery.labels(outcome).observe(seconds)


def count_send_retry(lane: str) -> None:
    """Count a send that is tried again."""
    _producer_retries.labels(lane).inc()


def count_dead_letter(topic: str, reason: str) -> None:
    """Count a dead letter; ``topic`` is where its record lay."""
    _letters.labels(topic, reason).inc()


def watch_s3(client: Any) -> None:
    """Time every call of a botocore client, by its own events."""
    events = client.meta.events
    events.register("before-call.s3", _s3_began)
    events.register("after-call.s3", _s3_answered)
    events.register("after-call-error.s3", _s3_failed)


def _s3_began(context: dict[str, Any], **_fields: Any) -> None:
    context["esper_began"] = time.perf_counter()


def _s3_answered(model: Any, parsed: dict[str, Any], context: dict[str, Any], **_fields: Any) -> None:
    told = parsed.get("ResponseMetadata", {})
    status = int(told.get("HTTPStatusCode", 0))
    outcome = "ok" if 200 <= status < 400 else "absent" if status == 404 else "failed" if status >= 500 else "refused"
    _count_s3_call(context, model.name, outcome, int(told.get("RetryAttempts", 0)))


def _s3_failed(exception: Exception, context: dict[str, Any], event_name: str, **_fields: Any) -> None:
    attempts = int(context.get("retries", {}).get("attempt", 1))
    _count_s3_call(context, event_name.rpartition(".")[2], "failed", attempts - 1)


def _count_s3_call(context: dict[str, Any], operation: str, outcome: str, num_retries: int) -> None:
    began = context.pop("esper_began", None)
    if began is not None:
        _s3.labels(operation, outcome).observe(time.perf_counter() - began)
    if num_retries > 0:
        _s3_retries.labels(operation).inc(num_retries)
