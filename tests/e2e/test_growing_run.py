"""A real run grows through Kafka, Faust and Postgres; its events are read with another Kafka client."""

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from confluent_kafka import Consumer, TopicPartition
from support.conditions import wait_until
from support.paths import ROOT
from support.processes.esper_processes import SCRIPTS, cli, log_of, process, running, worker
from support.processes.urza_server import LONG_TIMEOUTS

from esper.embedded.stack import EmbeddedStack
from esper.schemas.enums import Action, ReportMethod
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.dataset.experience_files import read_experiences, read_manifest

CONFIG = ROOT / "configs" / "digits.yaml"
SMALL = {
    "ESPER_TRAINER__EPOCHS": "10",
    "ESPER_TRAINER__COPIES": "14",
    "ESPER_TRAINER__LINK__BOUNDARY_STEPS": "50",
    "ESPER_TRAINER__CHECKPOINT_EPOCHS": "3",
}
FORKED = {
    "ESPER_TRAINER__EPOCHS": "5",
    "ESPER_TRAINER__COPIES": "5",
    "ESPER_TRAINER__LINK__BOUNDARY_STEPS": "25",
    "ESPER_TRAINER__FORK__GERMINATION_SHARE": "1",
    "ESPER_TRAINER__FORK__HORIZON_EPOCHS": "1",
}
CONTROLLER = {
    "ESPER_TAMIYO__POLICY": "schedule",
    "ESPER_TAMIYO__SCHEDULE_EVERY_EPOCHS": "1",
    "ESPER_TAMIYO__EXPIRY_BOUNDARIES": "40",
}


@pytest.fixture(scope="module")
def stack(log: EmbeddedStack) -> EmbeddedStack:
    """A stack of this module alone: its tests count all blueprints and all records."""
    return log


@pytest.fixture(scope="module")
def services(stack: EmbeddedStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("services")
    esper = str(SCRIPTS / "esper")
    with ExitStack() as exits:
        exits.enter_context(running(worker(stack, folder), "worker.ready"))
        urza = exits.enter_context(
            running(process(stack, folder, "urza", esper, "serve", "urza", **LONG_TIMEOUTS), "urza.ready")
        )
        tamiyo = process(stack, folder, "tamiyo", esper, "serve", "tamiyo", **CONTROLLER)
        exits.enter_context(running(tamiyo, "tamiyo.ready"))
        url = log_of(urza).split("url=")[1].split()[0]
        wait_until(lambda: httpx.get(f"{url}/health/ready", timeout=30).status_code == 200, 90, "Urza's readiness")
        yield {"url": url}


@pytest.fixture(scope="module")
def run(stack: EmbeddedStack, services: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    run_id, folder = f"first-light-{uuid.uuid4().hex[:8]}", tmp_path_factory.mktemp("run")
    code, printed = cli(stack, folder, "train", str(CONFIG), "--run-id", run_id, **SMALL)
    assert code == 0, printed
    return run_id


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("services")
def test_run_is_replayed_with_fork_rewards_and_equal_views(stack: EmbeddedStack, tmp_path: Path) -> None:
    run, into = f"forked-{uuid.uuid4().hex[:8]}", tmp_path / "experiences"
    code, printed = cli(stack, tmp_path, "train", str(CONFIG), "--run-id", run, **FORKED)
    assert code == 0, printed
    arguments = ("tamiyo", "replay", "--runs", run, "--verify", "--strict", "--show", "100", "--into", str(into))
    code, printed = cli(stack, tmp_path, *arguments, COLUMNS="200")
    assert code == 0, printed
    manifest, found = read_manifest(into), read_experiences(into)
    grown = [e for e in found if legal_choices(e.view)[e.chosen].action is Action.GERMINATE]
    assert grown, printed
    assert {e.method for e in grown} == {ReportMethod.FORK}
    num_views = manifest["num_decisions"] - manifest["set_aside"].get("stale", 0)
    assert f"{num_views} of {num_views} views are reproduced from the log, byte for byte" in printed
    code, printed = cli(stack, tmp_path, "tamiyo", "replay", "--again", str(into), COLUMNS="200")
    assert (code, f"equal to {into}" in printed) == (0, True), printed


CHAIN = (
    "control.tamiyo.decisions",
    "control.kasmina.commands",
    "control.kasmina.lifecycle",
    "innovation.field-reports",
)


def read_all(stack: EmbeddedStack, run_id: str, *more: str) -> list[dict[str, Any]]:
    """Every event of a run on these topics, by confluent-kafka: envelope from headers, value as JSON."""
    consumer = Consumer(
        {
            "bootstrap.servers": stack.kafka.bootstrap_servers,
            "group.id": uuid.uuid4().hex,
            "auto.offset.reset": "earliest",
        }
    )
    partitions = [TopicPartition(name, n, 0) for name in (*CHAIN, *more) for n in range(12)]
    num_left = sum(consumer.get_watermark_offsets(p, timeout=10)[1] for p in partitions)
    consumer.assign(partitions)
    found = []
    while num_left:
        for message in consumer.consume(min(num_left, 500), timeout=10):
            assert message.error() is None
            num_left -= 1
            if message.key() == run_id.encode():
                headers = {name: text.decode() for name, text in message.headers()}
                found.append({"topic": message.topic(), **headers, "data": json.loads(message.value())})
    consumer.close()
    return found


@pytest.mark.timeout(240)
def test_chain_of_causes_is_complete_and_projected(stack: EmbeddedStack, run: str) -> None:
    events = read_all(stack, run)
    by_id = {e["ce_id"]: e for e in events}
    reports = [e for e in events if e["topic"] == "innovation.field-reports"]
    assert reports, "no adaptation ended"
    for report in reports:
        ended = by_id[report["ce_causationid"]]
        assert ended["data"]["to_stage"] == report["data"]["outcome"]
        chain = [ended]
        while chain[-1]["topic"] == "control.kasmina.lifecycle":
            chain.append(by_id[chain[-1]["ce_causationid"]])
        command = chain[-1]
        assert command["topic"] == "control.kasmina.commands"
        decision = by_id[command["ce_causationid"]]
        assert decision["topic"] == "control.tamiyo.decisions"
        assert decision["ce_correlationid"] == run
        germination = by_id[report["data"]["command_id"]]
        assert germination["data"]["type"] == "esper.seed.germinate.v1"
        assert germination["ce_causationid"] == report["data"]["decision_id"]
        traces = {e["traceparent"].split("-")[1] for e in (decision, command, chain[-2])}
        assert len(traces) == 1, "decision, command and effect are one trace"
    with psycopg.connect(stack.postgres.dsn) as connection:

        def rows(sql: str) -> list[tuple[Any, ...]]:
            return connection.execute(sql, (run,)).fetchall()

        wait_until(lambda: len(rows("SELECT 1 FROM esper.field_reports WHERE run_id = %s")) == len(reports), 60)
        for table, event_type in (
            ("decisions", "esper.decision.made.v1"),
            ("lifecycle", "esper.seed.transitioned.v1"),
            ("breaker_changes", "esper.seed-breaker.changed.v1"),
            ("field_reports", "esper.adaptation.reported.v2"),
        ):
            in_kafka = {e["ce_id"] for e in events if e["ce_type"] == event_type}
            select = f"SELECT event_id FROM esper.{table} WHERE run_id = %s"
            wait_until(lambda s=select, n=len(in_kafka): len(rows(s)) == n, 60, table)
            in_rows = {str(r[0]) for r in rows(select)}
            assert in_rows <= in_kafka
            assert len(in_rows) == len(in_kafka), table
        causes = rows("SELECT command_id, decision_id FROM esper.commands WHERE run_id = %s")
        assert {str(c): str(d) for c, d in causes} == {
            e["ce_id"]: e["ce_causationid"] for e in events if e["topic"] == "control.kasmina.commands"
        }
        assert rows("SELECT status FROM esper.runs WHERE run_id = %s") == [("completed",)]
        impossible = rows("SELECT count(*) FROM esper.lifecycle WHERE run_id = %s AND is_impossible")
        assert impossible == [(0,)]


def trace_of(event: dict[str, Any]) -> str:
    return str(event["traceparent"].split("-")[1])


@pytest.mark.timeout(120)
def test_trace_passes_through_every_topic(stack: EmbeddedStack, run: str) -> None:
    """Headers alone connect a boundary, its decision, the command and the outcome of the seed."""
    boundaries = ("system.runs", "control.tamiyo.views")
    by_trace: dict[str, list[dict[str, Any]]] = {}
    for event in read_all(stack, run, *boundaries):
        by_trace.setdefault(trace_of(event), []).append(event)
    by_id = {e["ce_id"]: e for events in by_trace.values() for e in events}
    commands = [e for e in by_id.values() if e["topic"] == "control.kasmina.commands"]
    assert commands
    for command in commands:
        decision = by_id[command["ce_causationid"]]
        boundary = by_id[decision["ce_causationid"]]
        assert boundary["ce_type"] == "esper.boundary.reached.v1"
        together = {(e["topic"], e["data"].get("boundary")) for e in by_trace[trace_of(boundary)]}
        assert {(topic, boundary["data"]["boundary"]) for topic in (*boundaries, CHAIN[0])} <= together
        assert trace_of(boundary) == trace_of(decision) == trace_of(command)
    moved = [e for e in by_id.values() if e["topic"] == "control.kasmina.lifecycle" and "ce_causationid" in e]
    for effect in (*moved, *(e for e in by_id.values() if e["topic"] == "innovation.field-reports")):
        assert trace_of(effect) == trace_of(by_id[effect["ce_causationid"]])
    whole = [t for t, events in by_trace.items() if {e["topic"] for e in events} == {*boundaries, *CHAIN}]
    assert whole, "no trace passes through every topic"
    assert all(sum(e["ce_type"] == "esper.boundary.reached.v1" for e in events) <= 1 for events in by_trace.values())


@pytest.mark.timeout(120)
def test_records_conform_to_published_schemas(stack: EmbeddedStack, run: str, tmp_path: Path) -> None:
    code, printed = cli(stack, tmp_path, "schema", "validate", "--log", "--run", run, COLUMNS="120")
    assert code == 0, printed
    for event_type in (
        "esper.layer-health.measured.v2",
        "esper.run.started.v2",
        "esper.boundary.reached.v1",
        "esper.epoch.completed.v1",
        "esper.checkpoint.saved.v1",
        "esper.run.ended.v1",
        "esper.view.recorded.v1",
        "esper.decision.made.v1",
        "esper.seed.germinate.v1",
        "esper.seed.transitioned.v1",
        "esper.adaptation.reported.v2",
    ):
        assert event_type in printed


@pytest.mark.timeout(120)
def test_why_explains_seed_and_verify_agrees(stack: EmbeddedStack, run: str, tmp_path: Path) -> None:
    with psycopg.connect(stack.postgres.dsn) as connection:
        layer, seed = connection.execute(
            "SELECT layer_id, seed_id FROM esper.field_reports WHERE run_id = %s LIMIT 1", (run,)
        ).fetchone() or ("", 0)
    code, printed = cli(stack, tmp_path, "why", run, f"{layer}:{seed}", COLUMNS="200")
    assert code == 0, printed
    for word in ("decision", "command", "dormant -> germinated", "field report", "before_after"):
        assert word in printed
    code, printed = cli(
        stack, tmp_path, "events", "tail", "control.kasmina.lifecycle", "--run", run, "--from-beginning"
    )
    assert code == 0
    assert "esper.seed.transitioned.v1" in printed
    code, printed = cli(stack, tmp_path, "projections", "verify")
    assert code == 0, printed


def test_decisions_have_views_recorded_in_the_log(stack: EmbeddedStack, run: str) -> None:
    import asyncio
    import hashlib

    import zstandard

    from esper.oona.log_reader import partition_of, read_range
    from esper.schemas.topics import VIEWS

    async def views() -> dict[int, Any]:
        kafka, partition = stack.settings().need_kafka(), partition_of(run, VIEWS)
        records = [r async for r in read_range(kafka, VIEWS, partition=partition) if r.key == run.encode()]
        return {e.boundary: e for e in (r.decode().data for r in records)}

    found = asyncio.run(views())
    with psycopg.connect(stack.postgres.dsn) as connection:
        decided = connection.execute(
            "SELECT boundary, view_digest, probability FROM esper.decisions WHERE run_id = %s AND NOT stale", (run,)
        ).fetchall()
    assert decided
    for boundary, digest, probability in decided:
        view = zstandard.decompress(found[boundary].view_zstd)
        assert hashlib.sha256(view).hexdigest() == found[boundary].digest == digest
        assert json.loads(view)["boundary"] == boundary
        assert 0.0 < probability <= 1.0


def test_urza_serves_blueprints_kernels_and_runs(services: dict[str, str], run: str) -> None:
    import hashlib

    with httpx.Client(base_url=services["url"], timeout=30) as api:
        blueprints = api.get("/blueprints").json()["items"]
        assert {b["status"] for b in blueprints} == {"certified"}
        assert len(blueprints) >= 3
        kernel = api.get("/kernels").json()["items"][0]
        got = api.get(f"/kernels/{kernel['kernel_sha256']}")
        assert hashlib.sha256(got.content).hexdigest() == kernel["kernel_sha256"]
        assert api.get(f"/runs/{run}").json()["status"] == "completed"
        key = {"Idempotency-Key": f"test-{uuid.uuid4()}"}
        wrong = {"change": "retire", "expected_version": 99}
        first = api.post("/blueprints/noop/changes", json=wrong, headers=key).json()
        assert first["verdict"] == "wrong_version"
        assert api.post("/blueprints/noop/changes", json=wrong, headers=key).json() == first
        other = api.post("/blueprints/noop/changes", json={**wrong, "expected_version": 3}, headers=key)
        assert (other.status_code, other.headers["content-type"]) == (409, "application/problem+json")
