"""Urza's API for its clients: pages, causes, lineage, idempotent changes, tokens, caches and errors."""

import asyncio
import hashlib
import json
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.conditions import wait_until
from support.events.grown_run_events import KERNEL, grown_run_messages
from support.processes.esper_processes import cli
from support.processes.urza_server import READER, WRITER, items, key, refused, send

from esper.config import get_service_config, load_settings
from esper.embedded.stack import EmbeddedStack
from esper.errors import ConfigError
from esper.logging import trace_id_of
from esper.oona.log_reader import partition_of, read_range
from esper.schemas import events, ids
from esper.schemas.assets import LayerNode
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import BLUEPRINTS


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def run(stack: EmbeddedStack, api: httpx.Client) -> str:
    """A run that grew, projected."""
    run_id = f"grown-{uuid.uuid4().hex[:8]}"

    send(stack, grown_run_messages(run_id))
    wait_until(lambda: len(items(api, f"/runs/{run_id}/epochs")) == 2, 60, "the run")
    wait_until(lambda: len(items(api, f"/runs/{run_id}/reports")) == 2, 60, "its reports")
    wait_until(lambda: len(items(api, f"/runs/{run_id}/decisions")) == 4, 60, "its decisions")
    wait_until(lambda: len(history(api, run_id, "fc1", 1)) == 3, 60, "its commands")
    return run_id


def events_of(stack: EmbeddedStack, blueprint_id: str) -> list[OonaMessage]:
    """The events of a blueprint, in the order of the log."""

    async def read() -> list[OonaMessage]:
        partition = partition_of(blueprint_id, BLUEPRINTS)
        records = read_range(stack.settings().need_kafka(), BLUEPRINTS, partition=partition)
        return [r.decode() async for r in records if r.key == blueprint_id.encode()]

    return asyncio.run(read())


def history(api: httpx.Client, run_id: str, layer_id: str, seed_id: int) -> list[dict[str, Any]]:
    return api.get(f"/runs/{run_id}/causes", params={"layer_id": layer_id, "seed_id": seed_id}).json()["causes"]


def test_page_size_does_not_change_a_list(api: httpx.Client, run: str) -> None:
    paths = [
        f"/runs/{run}/{part}"
        for part in ("incarnations", "layers", "edges", "seeds", "epochs", "reports", "decisions", "views")
    ]
    parts = ("changes", "certificates", "refusals", "seeds", "runs", "reports")
    paths += [f"/blueprints/affine/{part}" for part in parts]
    for path in [*paths, "/blueprints", "/kernels", "/runs", "/dead-letters"]:
        wait_until(lambda p=path: items(api, p, 1) == items(api, p, 500), 60, path)  # kernels may still be built
        whole = items(api, path, 500)
        assert path in ("/dead-letters", "/kernels", "/blueprints/affine/refusals") or whole, path
        assert len({json.dumps(i, sort_keys=True) for i in whole}) == len(whole)


def test_cursor_belongs_to_its_list(api: httpx.Client) -> None:
    cursor = api.get("/blueprints?limit=1").json()["next"].split("cursor=")[1]
    for wrong in (
        f"/kernels?cursor={cursor}",
        "/blueprints?cursor=W10",
        f"/blueprints?cursor={cursor[:-3]}",
        "/blueprints?cursor=" + "W1tb" * 700,
    ):
        refused(api.get(wrong), 404)
    refused(api.get("/blueprints?cursor=%00"), 422)


def test_seed_history_is_a_chain_of_causes(api: httpx.Client, run: str) -> None:
    chain = history(api, run, "fc1", 0)
    kinds = [c["kind"] for c in chain]
    assert kinds[:3] == ["decision", "command", "lifecycle"]
    assert kinds[-1] == "field report"
    by_id = {c["event_id"]: c for c in chain}
    link, seen = chain[-1], []
    while link is not None:
        seen.append(link["kind"])
        link = by_id.get(link["causation_id"])
    assert seen == ["field report", "lifecycle", "command", "decision"]
    assert history(api, run, "out", 0) == []
    decision = api.get(f"/decisions/{ids.decision_id(run, 1, 1)}").json()
    assert decision["action"] == "germinate"
    assert [c["kind"] for c in decision["consequences"]] == ["command", *["lifecycle"] * 5]
    refusal = api.get(f"/decisions/{ids.decision_id(run, 1, 6)}").json()
    assert [c["kind"] for c in refusal["consequences"]] == ["command", "rejection"]


def test_resumed_run_marks_superseded_rows(api: httpx.Client, run: str) -> None:
    seeds = {(s["layer_id"], s["seed_id"]): s["stage"] for s in items(api, f"/runs/{run}/seeds")}
    assert seeds == {("fc1", 0): "fossilized", ("fc2", 1): "grafting"}
    assert [s["layer_id"] for s in items(api, f"/runs/{run}/seeds", stage="grafting")] == ["fc2"]
    superseded = {(d["incarnation"], d["boundary"]): d["is_superseded"] for d in items(api, f"/runs/{run}/decisions")}
    assert superseded == {(1, 1): False, (1, 3): False, (1, 4): False, (1, 6): True}
    assert [r["is_superseded"] for r in items(api, f"/runs/{run}/reports")] == [False, True]
    assert [d["boundary"] for d in items(api, f"/runs/{run}/decisions", action="germinate")] == [1, 4]


def test_lineage_of_a_blueprint(api: httpx.Client, run: str) -> None:
    living = [s for s in items(api, "/blueprints/affine/seeds") if s["run_id"] == run]
    assert [(s["layer_id"], s["stage"], s["kernel_sha256"]) for s in living] == [
        ("fc1", "fossilized", KERNEL),
        ("fc2", "grafting", KERNEL),
    ]
    used = next(u for u in items(api, "/blueprints/affine/runs") if u["run_id"] == run)
    assert (used["num_germinations"], used["num_fossilized"], used["num_given_up"]) == (2, 1, 1)
    reports = items(api, "/blueprints/affine/reports")  # other tests' runs are among them
    assert [r["is_superseded"] for r in reports if r["run_id"] == run] == [False, True]
    counted = Counter((r["outcome"], r["method"], r["metric"]) for r in reports if not r["is_superseded"])
    outcomes = api.get("/blueprints/affine/outcomes").json()["items"]
    assert {(o["outcome"], o["method"], o["metric"]): o["num_reports"] for o in outcomes} == counted
    good = [r["after"] - r["before"] for r in reports if r["outcome"] == "fossilized" and r["run_id"] == run]
    assert good == [pytest.approx(0.125)]
    fossilized = [o for o in outcomes if o["outcome"] == "fossilized"]
    assert any(o["least_gain"] - 1e-9 <= good[0] <= o["greatest_gain"] + 1e-9 for o in fossilized)
    changes = items(api, "/blueprints/affine/changes")
    assert [(c["change"], c["verdict"]) for c in changes[:3]] == [
        ("propose", "accepted"),
        ("compile", "accepted"),
        ("certify", "accepted"),
    ]


def test_blueprints_filter_by_state_module_and_target(api: httpx.Client) -> None:
    name = f"fresh-{uuid.uuid4().hex[:8]}"
    body = {"change": "propose", "expected_version": 0, "spec": {"module": "no_such_module", "targets": ["conv1d"]}}
    assert api.post(f"/blueprints/{name}/changes", json=body, headers=key()).json()["verdict"] == "accepted"
    assert name in [b["blueprint_id"] for b in items(api, "/blueprints", module="no_such_module", target="conv1d")]
    assert items(api, "/blueprints", module="no_such_module", target="linear") == []
    assert {b["status"] for b in items(api, "/blueprints", validated=False)} <= {"proposed", "compiled"}
    assert {b["status"] for b in items(api, "/blueprints", status=["certified", "retired"])} <= {"certified", "retired"}
    assert items(api, "/blueprints", status="certified", validated=False) == []


def test_change_is_applied_once_and_visible_to_the_next_read(api: httpx.Client) -> None:
    name, mine = f"once-{uuid.uuid4().hex[:8]}", key()
    refused(api.get(f"/blueprints/{name}"), 404)
    body = {
        "change": "propose",
        "expected_version": 0,
        "spec": {"module": "nothing", "targets": ["linear"]},
        "reason": "try",
    }
    first = api.post(f"/blueprints/{name}/changes", json=body, headers=mine)
    assert (first.status_code, first.json()["verdict"]) == (200, "accepted")
    assert api.get(f"/blueprints/{name}").json()["version"] >= 1
    assert api.post(f"/blueprints/{name}/changes", json=body, headers=mine).json() == first.json()
    assert [c["change"] for c in items(api, f"/blueprints/{name}/changes")][:1] == ["propose"]
    assert api.get(f"/changes/{first.json()['event_id']}").json() == first.json()
    others = [{**body, "reason": "else"}, {**body, "spec": {"module": "something", "targets": ["linear"]}}]
    for other in others:
        refused(api.post(f"/blueprints/{name}/changes", json=other, headers=mine), 409)
    refused(api.post(f"/blueprints/{name}x/changes", json=body, headers=mine), 409)


def test_each_of_many_changes_has_its_verdict(api: httpx.Client) -> None:
    names = [f"many-{n}-{uuid.uuid4().hex[:8]}" for n in range(3)]
    spec, mine = {"module": "nothing", "targets": ["linear"]}, key()
    requested = [{"blueprint_id": n, "change": "propose", "expected_version": 0, "spec": spec} for n in names]
    requested.append({"blueprint_id": names[0], "change": "retire", "expected_version": 77})
    done = api.post("/changes", json={"changes": requested}, headers=mine)
    assert done.status_code == 200
    assert [c["verdict"] for c in done.json()["changes"]] == ["accepted"] * 3 + ["wrong_version"]
    assert api.post("/changes", json={"changes": requested}, headers=mine).json() == done.json()
    refused(api.post("/changes", json={"changes": requested[::-1]}, headers=mine), 409)
    refused(api.post("/changes", json={"changes": []}, headers=key()), 422)


def test_one_trace_covers_request_certificate_and_kernels(api: httpx.Client, stack: EmbeddedStack, run: str) -> None:
    name, trace = f"traced-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    body = {"change": "propose", "expected_version": 0, "spec": {"module": "affine", "targets": ["linear"]}}
    headers = {**key(), "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    requested = api.post(f"/blueprints/{name}/changes", json=body, headers=headers).json()["event_id"]
    wait_until(lambda: items(api, "/kernels", blueprint_id=name, num_features=8), 90, "its kernel for the run")
    messages = events_of(stack, name)
    assert {trace_id_of(m.traceparent) for m in messages} == {trace}
    assert len({m.traceparent for m in messages}) == len(messages), "each event is a separate span"
    proposed, compiled, certificate, certified, *kernels = messages
    assert str(proposed.id) == requested
    assert [m.causation_id for m in (proposed, compiled, certificate, certified)] == [
        None,
        proposed.id,
        compiled.id,
        certificate.id,
    ]
    assert {m.causation_id for m in kernels} == {certified.id}
    headers = {**key(), "traceparent": "00-0-garbage"}
    body = {"change": "retire", "expected_version": 99}
    assert api.post(f"/blueprints/{name}/changes", json=body, headers=headers).status_code == 200
    (retired,) = [m for m in events_of(stack, name) if getattr(m.data, "change", None) == "retire"]
    assert trace_id_of(retired.traceparent) != trace


def test_certificates_and_refusals_of_a_blueprint(api: httpx.Client, stack: EmbeddedStack, run: str) -> None:
    (certificate,) = items(api, "/blueprints/low-rank-4/certificates")
    assert certificate["blueprint_version"] == 2
    assert certificate["checks"][:2] == ["identity", "shapes"]
    assert {m["num_features"] for m in certificate["measurements"]} == {16, 64}
    certified = items(api, "/blueprints/low-rank-4/changes")[2]
    assert (certified["change"], certified["causation_id"]) == ("certify", certificate["event_id"])
    wide = LayerNode(layer_id="wide", kind="linear", num_features=2**31 - 1, num_parameters=1, num_seeds=1)
    wants = f"wide-{uuid.uuid4().hex[:8]}"
    event = events.RunStarted(
        run_id=wants, incarnation=1, sequence=0, step=0, model="N", layers=(wide,), edges=(), boundary_steps=5,
        command_offset=0,
    )  # fmt: skip
    send(stack, [OonaMessage.of(event, id=ids.trainer_event_id(wants, 1, 0), source="test")])
    refusals = wait_until(lambda: items(api, "/blueprints/low-rank-4/refusals"), 60, "the refusal")
    assert [(r["target"], r["num_features"]) for r in refusals] == [("linear", 2**31 - 1)]
    assert "more than 50000000" in refusals[0]["reason"]
    for part in ("certificates", "refusals"):
        refused(api.get(f"/blueprints/missing/{part}"), 404)


def test_key_of_two_processes_has_two_verdicts(api: httpx.Client, stack: EmbeddedStack) -> None:
    mine, body = key(), {"change": "retire", "expected_version": 99, "reason": "twice"}
    event_id = ids.request_id(mine["Idempotency-Key"])
    both = ("noop", "affine")
    requested = [events.BlueprintChangeRequested(blueprint_id=name, **body) for name in both]
    send(stack, [OonaMessage.of(a, id=event_id, source="test") for a in requested])
    for name in both:
        at = f"/changes/{event_id}?blueprint_id={name}"
        wait_until(lambda at=at: api.get(at).status_code == 200, 30, "its verdict")
        assert api.get(at).json()["blueprint_id"] == name
    refused(api.post("/blueprints/norm/changes", json=body, headers=mine), 409)
    refused(api.post("/blueprints/noop/changes", json={**body, "reason": "else"}, headers=mine), 409)
    done = api.post("/blueprints/noop/changes", json=body, headers=mine)
    assert (done.status_code, done.json()["blueprint_id"]) == (200, "noop")
    assert api.get(f"/changes/{event_id}").json()["blueprint_id"] == "affine", "the first by name"
    assert [c["event_id"] for c in items(api, "/blueprints/noop/changes")].count(str(event_id)) == 1


def test_unchanged_response_is_not_sent_again(api: httpx.Client, url: str) -> None:
    first = api.get("/blueprints")
    packed = httpx.get(f"{url}/blueprints", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["vary"] == "Accept-Encoding"
    plain = httpx.get(f"{url}/blueprints", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.json() == first.json() == packed.json()
    for tag in (first.headers["etag"], plain.headers["etag"], f'W/{plain.headers["etag"]}, "x"', "*"):
        again = api.get("/blueprints", headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert "etag" in again.headers
    assert api.get("/blueprints", headers={"If-None-Match": '"other"'}).status_code == 200


def test_kernel_is_immutable(api: httpx.Client, url: str, run: str) -> None:
    kernels = wait_until(
        lambda: items(api, "/kernels", target="linear", num_features=8), 60, "kernels for the run's layers"
    )
    one = kernels[0]
    assert items(api, "/kernels", blueprint_id=one["blueprint_id"], num_features=8)
    assert items(api, "/kernels", blueprint_id=one["blueprint_id"], num_features=9) == []
    for encoding in ("identity", "gzip", "gzip;q=0"):
        got = httpx.get(f"{url}/kernels/{one['kernel_sha256']}", headers={"Accept-Encoding": encoding})
        assert hashlib.sha256(got.content).hexdigest() == one["kernel_sha256"]
        assert "immutable" in got.headers["cache-control"]
    known = api.get(f"/kernels/{one['kernel_sha256']}", headers={"If-None-Match": f'"{one["kernel_sha256"]}"'})
    assert known.status_code == 304
    refused(api.get(f"/kernels/{'0' * 64}"), 404)


def test_errors_are_problems(api: httpx.Client, run: str) -> None:
    refused(api.get("/nowhere"), 404)
    refused(api.get("/runs/missing"), 404)
    for part in ("seeds", "layers", "decisions", "causes?layer_id=a&seed_id=0"):
        refused(api.get(f"/runs/missing/{part}"), 404)
    assert refused(api.delete("/blueprints/noop/changes"), 405)
    assert api.delete("/blueprints/noop/changes").headers["allow"] == "GET, POST"
    wrong = refused(api.get("/blueprints?limit=0&colour=red"), 422)
    assert [e["at"] for e in wrong["errors"]] == ["query.limit", "query.colour"]
    refused(api.get("/runs/x?y=1"), 422)
    refused(api.get("/runs/%00"), 422)
    post = "/blueprints/noop/changes"
    refused(api.post(post, content=b"{}", headers={**key(), "Content-Type": "text/plain"}), 415)
    refused(api.post(post, content=b"{oops", headers={**key(), "Content-Type": "application/json"}), 422)
    refused(api.post(post, json={"change": "retire", "expected_version": 1}), 422)
    refused(api.post(post, json={"change": "propose", "expected_version": 0}, headers=key()), 422)
    too_large = b'{"reason": "' + b"x" * 2_000_000 + b'"}'
    refused(api.post(post, content=too_large, headers={**key(), "Content-Type": "application/json"}), 413)
    chunked = (too_large[n : n + 65_536] for n in range(0, len(too_large), 65_536))
    refused(api.post(post, content=chunked, headers={**key(), "Content-Type": "application/json"}), 413)


def test_without_tokens_only_this_host_is_served(api: httpx.Client, stack: EmbeddedStack, tmp_path: Path) -> None:
    assert api.get("/blueprints", headers={"Host": "localhost:1"}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1"):
        refused(api.get("/blueprints", headers={"Host": host}), 400)
    assert api.get("/health/live", headers={"Host": "10.0.0.7"}).status_code == 200
    code, printed = cli(stack, tmp_path, "serve", "urza", ESPER_URZA__HOST="0.0.0.0")
    assert code == 1
    assert "esper roles token" in printed
    assert "Traceback" not in printed
    with pytest.raises(ConfigError, match="64 hexadecimal digits") as caught:
        get_service_config("urza", load_settings(environ={"ESPER_URZA__WRITER_TOKENS_SHA256": "secret-token"}))
    assert "secret-token" not in str(caught.value)


def test_tokens_separate_readers_from_writers(guarded: str, folder: Path) -> None:
    with httpx.Client(base_url=guarded, timeout=30) as api:
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Basic {READER}"}):
            assert refused(api.get("/blueprints", headers=headers), 401)
            assert api.get("/blueprints", headers=headers).headers["www-authenticate"].startswith("Bearer")
        refused(api.get("/nowhere"), 401)
        as_reader, as_writer = ({"Authorization": f"Bearer {t}"} for t in (READER, WRITER))
        assert api.get("/blueprints", headers=as_reader).headers["cache-control"] == "private, no-cache"
        refused(api.get("/blueprints"), 401)
        body = {"change": "retire", "expected_version": 99}
        refused(api.post("/blueprints/noop/changes", json=body, headers={**as_reader, **key()}), 403)
        done = api.post("/blueprints/noop/changes", json=body, headers={**as_writer, **key()})
        assert done.json()["verdict"] == "wrong_version"
        assert api.get("/health/live").status_code == 200
        assert api.get("/openapi.json").json()["components"]["securitySchemes"]
    log = (folder / "guarded.log").read_text()
    assert WRITER not in log
    assert READER not in log


def test_malformed_http_does_not_stop_the_server(api: httpx.Client, url: str) -> None:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as raw:
        raw.sendall(b"GET /\xff\x00 HTTP/9\r\n\r\n")
        assert b"400" in raw.recv(1000)
    assert api.get("/health/live").status_code == 200
