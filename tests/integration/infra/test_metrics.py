"""Scrapes four real processes with the commands and settings of infra/stack.yml: their metrics match the catalogue, and a
stopped partition fires its alert."""

import asyncio
import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest
import torch
import yaml
from aiokafka import AIOKafkaProducer
from prometheus_client.parser import text_string_to_metric_families
from support.conditions import wait_until
from support.infra.compose_files import environment_here, environment_of, image_check, image_of, own_services
from support.infra.promql import evaluate, samples_of
from support.paths import INFRA
from support.processes.esper_processes import READY_S, SCRIPTS, WORKER, cli, log_of, process
from torch import nn

import esper
from esper.cli.metrics import SHARED, catalogue
from esper.connection.settings import LinkOptions
from esper.embedded.processes import ChildProcess, free_port
from esper.embedded.stack import EmbeddedStack, inherited_environment
from esper.oona.cloudevents import encode
from esper.oona.log_reader import partition_of
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.topics import RUNS, TELEMETRY
from esper.schemas.upcasters import next_version

pytestmark = pytest.mark.slow

ALERTS = INFRA / "prometheus" / "alerts.yml"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SIGNALS = (HealthSignal(layer_id="fc1", seed_id=0, chunk_id=0, epoch=0, health_score=0.5),)


class Services(NamedTuple):
    """The metrics URL of each process, and the URL of Urza's API."""

    stack: EmbeddedStack
    worker: str
    urza: str
    tamiyo: str
    api: str


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    from support.stacks import running_stack

    folder, port_of_api = tmp_path_factory.mktemp("services"), str(free_port())
    more = {"worker": {"ESPER_STREAMS__STALLED_AFTER_S": "10"}, "urza": {"ESPER_URZA__PORT": port_of_api}}
    with ExitStack() as exits:
        stack = exits.enter_context(running_stack())
        urls, children = {}, {}
        for name in ("worker", "urza", "tamiyo"):
            port = str(free_port())
            children[name] = as_deployed(name, stack, folder, port, **more.get(name, {}))
            children[name].start()
            exits.callback(children[name].stop)
            urls[name] = f"http://127.0.0.1:{port}"
        for name, child in children.items():
            child.wait_until_ready(lambda c=child, line=f'"{name}.ready"': line in log_of(c), READY_S)
        yield Services(stack, **urls, api=f"http://127.0.0.1:{port_of_api}")


def as_deployed(name: str, stack: EmbeddedStack, folder: Path, port: str, **changes: str) -> ChildProcess:
    """A service of infra/stack.yml without Docker: its command and environment, with other addresses."""
    (variable,) = (v for v in environment_of(own_services()[name]) if v.endswith("METRICS_PORT"))
    env = environment_here(name, stack, folder, **{variable: port}, **changes)
    program, *arguments = own_services()[name]["command"]
    return ChildProcess(
        name,
        [str(SCRIPTS / program), *arguments],
        env={**inherited_environment(), **env},
        log_path=folder / f"{name}.log",
        cwd=folder,
    )


def scrape(url: str) -> str:
    answer = httpx.get(f"{url}/metrics", timeout=30)
    assert answer.status_code == 200
    return answer.text


def metric(url: str, name: str, **labels: str) -> float | None:
    """One sample; None where the series is absent."""
    return samples_of(scrape(url)).get(name, {}).get(frozenset(labels.items()))


def assert_in_catalogue(process_name: str, scraped: str) -> set[str]:
    """Check type and labels of every scraped Esper metric against the catalogue; returns the names."""
    specs = {s.name: s for s in (*catalogue()[process_name], *catalogue()[SHARED])}
    found = set()
    for family in text_string_to_metric_families(scraped):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if not name.startswith("esper_") or not family.samples or name.endswith("_created"):
            continue
        spec = specs[name]
        assert (family.type, family.documentation) == (spec.kind, spec.help)
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(spec.labels), sample
        found.add(name)
    return found


async def send(stack: EmbeddedStack, *messages: OonaMessage) -> None:
    async with OonaProducer(stack.settings().need_kafka()) as producer:
        await producer.send_batch(messages)


async def send_raw(
    stack: EmbeddedStack, topic: str, key: bytes, value: bytes, headers: list[tuple[str, bytes]]
) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=stack.kafka.bootstrap_servers)
    await producer.start()
    await producer.send_and_wait(topic, value, key=key, headers=headers)
    await producer.stop()


def trainer_message(run_id: str, sequence: int, event: type[events.TrainerEvent], **fields: Any) -> OonaMessage:
    body = event(run_id=run_id, incarnation=1, sequence=sequence, **fields)
    return OonaMessage.of(body, id=ids.trainer_event_id(run_id, 1, sequence), source="test")


@pytest.mark.timeout(240)
async def test_stopped_partition_is_in_readyz_and_fires_alert(services: Services) -> None:
    run_id, url = f"stopped-{uuid.uuid4().hex[:8]}", services.worker
    partition_labels = {"topic": TELEMETRY.name, "partition": str(partition_of(run_id, TELEMETRY))}
    assert httpx.get(f"{url}/healthz", timeout=30).json() == {"status": "live"}
    ready = {"status": "ready", "problems": []}  # on a busy machine it first lags behind Urza's catalogue
    wait_until(lambda: httpx.get(f"{url}/readyz", timeout=30).json() == ready, 90, "the worker's readiness")
    assert assert_in_catalogue("worker", scrape(url)) >= {"esper_build_info", "esper_worker_partitions"}

    health = {"step": 1, "epoch": 0, "layer_id": "fc1", "signals": SIGNALS}
    await send(services.stack, *(trainer_message(run_id, n, events.LayerHealthMeasured, **health) for n in range(3)))
    wait_until(lambda: metric(url, "esper_worker_events_total", topic=TELEMETRY.name) == 3, 60, "the three events")
    wait_until(lambda: metric(url, "esper_worker_lag_records", **partition_labels) == 0, 60, "an end that is known")
    assert metric(url, "esper_worker_lag_seconds", **partition_labels) == 0
    await send_raw(services.stack, RUNS.name, b"k", b"garbage", [("odd", b"\xfe")])
    labels = {"topic": RUNS.name, "reason": "bad_header"}
    wait_until(lambda: metric(url, "esper_dead_letters_total", **labels) == 1, 60, "the dead letter")

    record = encode(trainer_message(run_id, 3, events.LayerHealthMeasured, **health))
    event_type = "esper.layer-health.measured.v2"
    headers = [(n, next_version(event_type).encode() if n == "ce_type" else v or b"") for n, v in record.headers]
    assert record.key is not None
    assert record.value is not None
    await send_raw(services.stack, TELEMETRY.name, record.key, record.value, headers)
    wait_until(
        lambda: metric(url, "esper_worker_partition_stopped", **partition_labels) == 1, 60, "the stopped partition"
    )
    answer = httpx.get(f"{url}/readyz", timeout=30)
    assert answer.status_code == 503
    problems = [p for p in answer.json()["problems"] if p.get("topic") == partition_labels["topic"]]
    (problem,) = (p for p in problems if str(p["partition"]) == partition_labels["partition"])
    assert "newer than v2" in problem["reason"]
    assert httpx.get(f"{url}/healthz", timeout=30).status_code == 200, "a restart would not help"
    wait_until(lambda: metric(url, "esper_worker_lag_records", **partition_labels) == 1, 60, "the record that is left")

    rules = {r["alert"]: r["expr"] for g in yaml.safe_load(ALERTS.read_text())["groups"] for r in g["rules"]}
    samples = samples_of(scrape(url), job="esper-worker", instance="w")
    firing = evaluate(rules["EsperPartitionStopped"], samples)
    assert isinstance(firing, dict)
    assert [dict(labels) for labels in firing] == [{**partition_labels, "job": "esper-worker", "instance": "w"}]
    assert evaluate(rules["EsperPartitionStalled"], samples) == {}, "a stopped partition is not also stalled"
    assert assert_in_catalogue("worker", scrape(url)) >= {s.name for s in catalogue()["worker"]} - {
        "esper_worker_retries_total"
    }


def test_urza_counts_responses_by_route(services: Services) -> None:
    wait_until(lambda: httpx.get(f"{services.urza}/readyz", timeout=30).status_code == 200, 90, "Urza's readiness")
    labels = {"route": "/runs/{run_id}", "method": "GET", "status": "404"}
    for name in ("unknown-1", "unknown-2"):
        httpx.get(f"{services.api}/runs/{name}", timeout=30)
    wait_until(lambda: metric(services.urza, "esper_urza_request_seconds_count", **labels) == 2, 30, "both counted")
    key = f"metrics-{uuid.uuid4()}"
    reply = httpx.post(
        f"{services.api}/blueprints/noop/changes",
        json={"change": "retire", "expected_version": 99},
        headers={"Idempotency-Key": key, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"},
        timeout=60,
    )
    assert reply.status_code in (200, 202), reply.text
    found = assert_in_catalogue("urza", scrape(services.urza))
    assert found >= {"esper_urza_request_seconds", "esper_producer_records_total", "esper_producer_delivery_seconds"}
    assert httpx.get(f"{services.urza}/healthz", timeout=30).status_code == 200


def train(services: Services, folder: Path, run_id: str, scrapes: dict[str, Any]) -> None:
    """Run a short training that serves metrics, and scrape it before its end."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), seeds_per_layer=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    port = free_port()
    options = LinkOptions(boundary_steps=5, health_interval_steps=1, folder=folder, metrics_port=port)
    settings = services.stack.settings()
    with esper.connect(model, optimizer, run_id=run_id, settings=settings, options=options) as run:
        for _n in range(10):
            optimizer.zero_grad()
            model(torch.ones(4, 6)).sum().backward()
            optimizer.step()
            run.step()
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: metric(url, "esper_trainer_outbox_records") == 0, 60, "an empty outbox")
        scrapes.update(
            scraped=scrape(url),
            ready=httpx.get(f"{url}/readyz", timeout=30),
            live=httpx.get(f"{url}/healthz", timeout=30),
        )
        decided = {"topic": "system.runs", "outcome": "acknowledged"}
        scrapes["sent"] = metric(url, "esper_producer_records_total", **decided)
        wait_until(
            lambda: metric(services.tamiyo, "esper_tamiyo_poll_age_seconds") is not None, 60, "Tamiyo's first poll"
        )
        wait_until(
            lambda: any(name == "esper_tamiyo_decisions_total" for name in samples_of(scrape(services.tamiyo))),
            60,
            "a decision",
        )
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/metrics")


@pytest.mark.timeout(240)
async def test_trainer_and_tamiyo_metrics_of_a_run(services: Services, tmp_path: Path) -> None:
    run_id, scrapes = f"trainer-{uuid.uuid4().hex[:8]}", dict[str, Any]()
    await asyncio.to_thread(train, services, tmp_path, run_id, scrapes)
    samples = samples_of(scrapes["scraped"])
    assert samples["esper_trainer_steps_total"] == {frozenset(): 10}
    assert samples["esper_trainer_run_info"] == {frozenset({("run", run_id), ("incarnation", "1")}): 1}
    assert samples["esper_trainer_seeds"][frozenset({("stage", "dormant")})] == 4
    assert samples["esper_trainer_telemetry_lost_total"] == {frozenset(): 0}
    assert scrapes["sent"] >= 3, "its start and two boundaries"
    assert (scrapes["ready"].status_code, scrapes["live"].status_code) == (200, 200)
    assert assert_in_catalogue("trainer", scrapes["scraped"]) >= {s.name for s in catalogue()["trainer"]} - {
        "esper_trainer_commands_total"
    }
    wait_until(lambda: httpx.get(f"{services.tamiyo}/readyz", timeout=30).status_code == 200, 90, "Tamiyo's readiness")
    assert assert_in_catalogue("tamiyo", scrape(services.tamiyo)) >= {
        "esper_tamiyo_decisions_total",
        "esper_tamiyo_decision_seconds",
        "esper_tamiyo_policy_info",
        "esper_tamiyo_boundaries_pending",
    }


@pytest.mark.timeout(120)
def test_container_health_checks_reach_the_processes(services: Services) -> None:
    for name, url in (("worker", services.worker), ("urza", services.urza), ("tamiyo", services.tamiyo)):
        service = own_services()[name]
        for command in (service["healthcheck"]["test"][1:], image_check(image_of(service))):
            assert command[0] == "python"
            here = [sys.executable, command[1], re.sub(r"http://127\.0\.0\.1:\d+", url, command[2])]
            is_ready = httpx.get(f"{url}/readyz", timeout=30).status_code == 200
            expected = is_ready or "healthz" in command[2]
            done = subprocess.run(here, capture_output=True, text=True, check=False, timeout=60)
            assert (done.returncode == 0) is expected, (name, done.stderr)


@pytest.mark.timeout(120)
def test_port_in_use_is_one_line_in_every_process(services: Services, tmp_path: Path) -> None:
    port = services.worker.rpartition(":")[2]
    message = f"127.0.0.1:{port}: another process uses this port"
    code, printed = cli(services.stack, tmp_path, "serve", "tamiyo", ESPER_TAMIYO__METRICS_PORT=port)
    assert code == 1
    assert message in printed
    assert "ESPER_TAMIYO__METRICS_PORT" in printed
    assert "Traceback" not in printed
    second = process(services.stack, tmp_path, "second", *WORKER, ESPER_STREAMS__METRICS_PORT=port)
    second.start()
    wait_until(lambda: not second.is_alive, 60, "the refusal")
    assert message in log_of(second)
    assert "Traceback" not in log_of(second)


ENDED = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'esper' AND pid <> pg_backend_pid()"


@pytest.mark.timeout(240)
async def test_terminated_connections_stop_no_process(services: Services) -> None:
    """asyncpg raises a third kind of error if a connection ends during a query."""

    def stopped_partitions() -> set[Any]:
        samples = samples_of(scrape(services.worker))["esper_worker_partition_stopped"]
        return {labels for labels, value in samples.items() if value}

    def num_projected() -> float:
        return metric(services.worker, "esper_worker_events_total", topic=RUNS.name) or 0

    run_id, before, projected = f"ended-{uuid.uuid4().hex[:8]}", stopped_partitions(), num_projected()
    epoch = {"epoch": 0, "step": 1, "metrics": {"val_accuracy": 0.5}}
    with psycopg.connect(services.stack.postgres.dsn, autocommit=True) as admin:
        async with OonaProducer(services.stack.settings().need_kafka()) as producer:
            for n in range(100):
                await producer.send(trainer_message(run_id, n, events.EpochCompleted, **epoch))
                admin.execute(ENDED)
        count = "SELECT count(*) FROM esper.epochs WHERE run_id = %s"
        wait_until(lambda: admin.execute(count, (run_id,)).fetchone() == (100,), 90, "all of them")
    wait_until(lambda: num_projected() == projected + 100, 90, "their count")
    assert stopped_partitions() == before
    assert (metric(services.worker, "esper_worker_retries_total", topic=RUNS.name, cause="postgres") or 0) >= 1
    wait_until(lambda: httpx.get(f"{services.tamiyo}/readyz", timeout=30).status_code == 200, 90, "Tamiyo's readiness")


@pytest.mark.timeout(240)
def test_postgres_outage_makes_tamiyo_not_ready(services: Services) -> None:
    """Keep it last: it stops the database."""
    services.stack.postgres.stop()
    try:

        def problem() -> Any:
            answer = httpx.get(f"{services.tamiyo}/readyz", timeout=30)
            return answer.status_code == 503 and json.loads(answer.text)["problems"][0]["reason"]

        assert wait_until(problem, 60, "Tamiyo's problem")
        assert httpx.get(f"{services.tamiyo}/healthz", timeout=30).status_code == 200
        assert sum(samples_of(scrape(services.tamiyo))["esper_tamiyo_poll_failures_total"].values()) >= 1
    finally:
        services.stack.postgres.start()
    wait_until(lambda: httpx.get(f"{services.tamiyo}/readyz", timeout=30).status_code == 200, 90, "its end")
