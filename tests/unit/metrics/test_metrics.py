"""Metrics without services: names, absent values, lag, readiness, ports, routes, and the table in the docs."""

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError
from platform import python_version
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.paths import DOCS

from esper.cli.metrics import catalogue, markdown
from esper.config import load_settings
from esper.errors import ConfigError, InvariantError, UnavailableError
from esper.logging import incoming_trace
from esper.metrics import Health, Kind, Meter, MetricsAddress, MetricsServer, Problem, client_metrics
from esper.oona.log_reader import StoredRecord
from esper.oona.progress_watch import Stall
from esper.oona.records import Position
from esper.services.urza.metrics import UrzaMetrics
from esper.streams.settings import StreamsSettings
from esper.streams.worker.batch_projection import Batch, ProjectedBatch
from esper.streams.worker.projection_worker import ProjectionWorker
from esper.streams.worker.worker_metrics import NOT_ASSIGNED, WorkerMetrics

MONITORING = DOCS / "deployment" / "monitoring.md"
ANY_PORT = MetricsAddress("127.0.0.1", 0, "ESPER_TEST__PORT")
PARTITION = ("system.runs", 3)


def scraped(meter: Meter) -> dict[tuple[str, tuple[str, ...]], float]:
    """The samples of a scrape: (name, label values in the order of the label names) -> value."""
    families = text_string_to_metric_families(generate_latest(meter.registry).decode())
    return {(s.name, tuple(v for _n, v in sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def batch(start: int, *times_ms: int) -> Batch:
    records = tuple(
        StoredRecord(Position(*PARTITION, start + n), b"k", b"{}", (), time_ms) for n, time_ms in enumerate(times_ms)
    )
    return Batch(*PARTITION, start, records)


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def worker() -> tuple[WorkerMetrics, Clock, Clock]:
    wall, clock = Clock(1_000.0), Clock(50.0)
    return WorkerMetrics(now_s=wall, clock=clock), wall, clock


def lag_of(metrics: WorkerMetrics) -> tuple[float | None, float | None]:
    found, labels = scraped(metrics.meter), (str(PARTITION[1]), PARTITION[0])
    return found.get(("esper_worker_lag_records", labels)), found.get(("esper_worker_lag_seconds", labels))


def test_metrics_table_in_docs_matches_code() -> None:
    assert markdown(catalogue()) in MONITORING.read_text(encoding="utf-8"), (
        "write the output of `esper metrics docs` into docs/deployment/monitoring.md"
    )


def test_metric_names_are_unique() -> None:
    names = [spec.name for specs in catalogue().values() for spec in specs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Kind.GAUGE, "lag"),
        (Kind.GAUGE, "esper_lag"),
        (Kind.GAUGE, "esper_worker_events_total"),
        (Kind.COUNTER, "esper_worker_events"),
        (Kind.GAUGE, "esper_Worker_lag"),
    ],
)
def test_invalid_metric_name_raises(kind: Kind, name: str) -> None:
    with pytest.raises(InvariantError, match="is not a valid"):
        Meter().probe(kind, name, "help", lambda: 1.0)


def test_build_info_needs_no_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Esper imported from a source tree has no package metadata."""

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("esper.metrics.client_metrics.version", version)
    meter = Meter()
    client_metrics.show_build(meter, "worker")
    assert scraped(meter) == {("esper_build_info", ("worker", python_version(), "unknown")): 1}


def test_histogram_name_without_unit_raises() -> None:
    with pytest.raises(InvariantError, match="unit"):
        Meter().histogram("esper_worker_projection", "help")


def test_metric_without_value_is_absent() -> None:
    meter = Meter()
    values: dict[str, Any] = {"plain": None, "labelled": {}}
    meter.probe(Kind.GAUGE, "esper_test_plain", "help", lambda: values["plain"])
    meter.probe(Kind.GAUGE, "esper_test_labelled", "help", lambda: values["labelled"], "topic")
    assert scraped(meter) == {}
    values.update(plain=0.0, labelled={("a",): 2.0})
    assert scraped(meter) == {("esper_test_plain", ()): 0.0, ("esper_test_labelled", ("a",)): 2.0}


def test_new_worker_has_no_values_for_unknown_lag(
    worker: tuple[WorkerMetrics, Clock, Clock],
) -> None:
    metrics, _wall, _clock = worker
    metrics.partitions_assigned({PARTITION: 7})
    assert lag_of(metrics) == (None, None)
    metrics.update_positions({PARTITION: None}, [])
    assert lag_of(metrics) == (None, None)
    names = {name for name, _labels in scraped(metrics.meter)}
    assert not {n for n in names if n.startswith(("esper_worker_events", "esper_worker_batch_seconds"))}


def test_lag_in_records_and_seconds(worker: tuple[WorkerMetrics, Clock, Clock]) -> None:
    metrics, wall, clock = worker
    metrics.partitions_assigned({PARTITION: 0})
    metrics.update_positions({PARTITION: 5}, [])
    assert lag_of(metrics) == (5, None), "nothing was projected, so the age is unknown"
    metrics.batch_projected(batch(0, 900_000, 940_000), 2)
    assert lag_of(metrics) == (3, 60.0), "the newest projected record is 60 s old by the broker's clock"
    metrics.batch_projected(batch(2, 999_000, 999_500, 999_900), 3)
    assert lag_of(metrics) == (0, 0.0)
    metrics.update_positions({PARTITION: 5}, [])
    wall.now, clock.now = 5_000.0, 4_050.0
    metrics.update_positions({PARTITION: 6}, [])
    assert lag_of(metrics)[0] == 1
    assert lag_of(metrics)[1] == 4_000.0
    metrics.batch_projected(batch(5, 4_999_000), 1)
    metrics.update_positions({PARTITION: 6}, [])
    clock.now += 2.0
    metrics.update_positions({PARTITION: 9}, [])
    wall.now += 100.0
    assert lag_of(metrics) == (3, 2.0), "nothing was left two seconds ago, however old the newest record is"


def test_lag_with_broker_clock_ahead_is_not_negative(worker: tuple[WorkerMetrics, Clock, Clock]) -> None:
    metrics, wall, _clock = worker
    metrics.partitions_assigned({PARTITION: 0})
    metrics.batch_projected(batch(0, 1_030_000), 1)
    metrics.update_positions({PARTITION: 2}, [])
    assert lag_of(metrics) == (1, 0.0)
    wall.now += 5
    assert lag_of(metrics) == (1, 5.0)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 10**7)), max_size=20))
def test_lag_is_never_negative(updates: list[tuple[int, int, int]]) -> None:
    metrics = WorkerMetrics(now_s=Clock(5_000.0), clock=Clock(1.0))
    metrics.partitions_assigned({PARTITION: 0})
    for start, end, time_ms in updates:
        metrics.batch_projected(batch(start, time_ms), 1)
        metrics.update_positions({PARTITION: end}, [])
        records, seconds = lag_of(metrics)
        assert records is not None
        assert records >= 0
        assert seconds is None or seconds >= 0
        assert (records == 0) == (seconds == 0) or records > 0


def test_stopped_partition_is_reported_until_reassigned(worker: tuple[WorkerMetrics, Clock, Clock]) -> None:
    metrics, _wall, _clock = worker
    labels = (str(PARTITION[1]), PARTITION[0])
    assert [p.reason for p in metrics.health.problems()] == [NOT_ASSIGNED]
    metrics.partitions_assigned({PARTITION: 0, ("system.runs", 4): 0})
    assert metrics.health.problems() == []
    metrics.partition_stopped(PARTITION, "newer than v2")
    found = scraped(metrics.meter)
    assert found["esper_worker_partition_stopped", labels] == 1
    assert found["esper_worker_partition_stopped", ("4", "system.runs")] == 0
    assert metrics.health.problems() == [Problem("newer than v2", *PARTITION)]
    metrics.update_positions(
        {}, [Stall(*PARTITION, 0, 5, 31.0, "newer than v2"), Stall("system.runs", 4, 0, 5, 31.0, "no progress")]
    )
    assert len(metrics.health.problems()) == 2
    assert scraped(metrics.meter)["esper_worker_partition_stalled", ("4", "system.runs")] == 1
    metrics.partitions_assigned({PARTITION: 0})
    assert scraped(metrics.meter)["esper_worker_partition_stopped", labels] == 0
    assert ("esper_worker_partition_stopped", ("4", "system.runs")) not in scraped(metrics.meter), (
        "it is assigned to another worker"
    )


def test_retries_are_counted_by_cause(worker: tuple[WorkerMetrics, Clock, Clock]) -> None:
    metrics, _wall, _clock = worker
    metrics.batch_retried("system.runs", asyncpg.DeadlockDetectedError("x"))
    metrics.batch_retried("system.runs", UnavailableError("no broker answers"))
    found = scraped(metrics.meter)
    assert found["esper_worker_retries_total", ("postgres", "system.runs")] == 1
    assert found["esper_worker_retries_total", ("kafka", "system.runs")] == 1


@contextmanager
def served(meter: Meter, health: Health) -> Iterator[str]:
    server = MetricsServer(meter.registry, health)
    port = server.start(ANY_PORT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_healthz_and_readyz_differ() -> None:
    clock, problems = Clock(0.0), [Problem("stopped", "system.runs", 3)]
    health = Health(lambda: problems, clock)
    with served(Meter(), health) as url:
        assert get(f"{url}/healthz") == (200, '{"status": "live"}\n')
        status, body = get(f"{url}/readyz")
        assert status == 503
        assert json.loads(body) == {
            "status": "not ready",
            "problems": [{"reason": "stopped", "topic": "system.runs", "partition": 3}],
        }
        problems.clear()
        assert get(f"{url}/readyz")[0] == 200
        clock.now = 61.0
        assert get(f"{url}/healthz")[0] == 503
        assert "hangs" in get(f"{url}/readyz")[1]
        health.beat()
        assert get(f"{url}/healthz")[0] == 200
        assert "process_cpu_seconds_total" in get(f"{url}/metrics")[1]
        assert get(f"{url}/secrets")[0] == 404


async def test_running_event_loop_sends_heartbeats() -> None:
    clock = Clock(0.0)
    health = Health(list, clock)
    clock.now = 100.0
    assert not health.is_live
    beating = asyncio.create_task(health.keep_beating())
    await asyncio.sleep(0)
    assert health.is_live
    beating.cancel()


def test_port_in_use_error_names_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = MetricsServer(Meter().registry, Health(list))
        with pytest.raises(
            ConfigError, match=f"127.0.0.1:{port}: another process uses this port; set ESPER_TEST__PORT"
        ):
            server.start(MetricsAddress("127.0.0.1", port, "ESPER_TEST__PORT"))
        server.stop()
    with pytest.raises(ConfigError, match="ESPER_TEST__PORT"):
        server.start(MetricsAddress("192.0.2.1", 0, "ESPER_TEST__PORT"))


async def test_requests_are_counted_by_route() -> None:
    api, metrics = FastAPI(), UrzaMetrics(lambda: False)

    @api.get("/runs/{run_id}")
    def run(run_id: str) -> str:
        if run_id == "broken":
            raise RuntimeError("a bug")
        return run_id

    transport: Any = httpx.ASGITransport(metrics.wrap_app(api), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://urza") as client:
        for path in ("/runs/a", "/runs/b", "/runs/broken", "/no/such", "/other"):
            await client.get(path)
        await client.request("BREW", "/runs/a")
    counts = {
        labels: n for (name, labels), n in scraped(metrics.meter).items() if name == "esper_urza_request_seconds_count"
    }
    assert counts == {
        ("GET", "/runs/{run_id}", "200"): 2,
        ("GET", "/runs/{run_id}", "500"): 1,
        ("GET", "none", "404"): 2,
        ("none", "/runs/{run_id}", "405"): 1,
    }
    assert scraped(metrics.meter)["esper_urza_requests_in_flight", ()] == 0
    assert [p.reason for p in metrics.health.problems()]


@pytest.mark.parametrize(
    ("header", "is_accepted"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        (" 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00 ", True),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", False),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n", True),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        ("", False),
        (None, False),
    ],
)
def test_incoming_trace_accepts_valid_headers_only(header: str | None, is_accepted: bool) -> None:
    assert (incoming_trace(header) is not None) == is_accepted


def test_last_transition_survives_a_checkpoint() -> None:
    from uuid import uuid4

    from esper.connection.boundary_processor import BoundaryProcessor
    from esper.connection.events.journal import Cause

    def work() -> Any:
        nothing: Any = None
        return BoundaryProcessor(nothing, nothing, nothing, nothing, nothing)

    before, after = work(), work()
    before._last_transitions["fc1", 2] = Cause(uuid4(), "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    after.load_causes(json.loads(json.dumps(before.causes())))
    assert after._last_transitions == before._last_transitions


@pytest.mark.parametrize("error", [asyncpg.InternalClientError("cannot switch to state 12"), OSError("away")])
async def test_worker_retries_after_any_connection_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [error, error]

    async def project_batch(_connection: object, _batch: Batch, cache: object) -> ProjectedBatch:
        if left:
            raise left.pop()
        return ProjectedBatch(0, has_dead_letters=False, transaction_s=0.0)

    class Pool:
        def acquire(self) -> Any:
            return nullcontext()

    monkeypatch.setattr("esper.streams.worker.projection_worker.project_batch", project_batch)
    worker = ProjectionWorker(load_settings(environ={}), StreamsSettings.model_validate({"retry_max_delay_s": 0.01}))
    monkeypatch.setattr(worker, "_pool", Pool(), raising=False)
    monkeypatch.setattr(worker, "_producer", object())
    worker.metrics.partitions_assigned({PARTITION: 0})
    await worker.project(batch(0, 1), is_current=True)
    assert not left
    assert worker.metrics.health.problems() == []
    assert ("esper_worker_retries_total", (("postgres", "kafka")[isinstance(error, OSError)], PARTITION[0])) in scraped(
        worker.metrics.meter
    )
