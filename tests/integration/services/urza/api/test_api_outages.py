"""Urza's API while its dependencies are away and while its tables are replaced, on a fresh stack."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.conditions import wait_until
from support.events.grown_run_events import grown_run_messages
from support.processes.esper_processes import cli
from support.processes.urza_server import items, key, refused, send, urza_and_worker

from esper.embedded.stack import EmbeddedStack

pytestmark = pytest.mark.slow

CHANGE = {"change": "retire", "expected_version": 99}
PATHS = (
    "/blueprints",
    "/kernels",
    "/runs/steady/epochs",
    "/blueprints/affine/reports",
    "/blueprints/affine/certificates",
)


@pytest.mark.timeout(300)
def test_requests_survive_a_rebuild_and_outages_are_named(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    stack = fresh_stack
    with urza_and_worker(stack, tmp_path) as url, httpx.Client(base_url=url, timeout=30) as api:
        send(stack, grown_run_messages("steady"))
        wait_until(lambda: len(items(api, "/runs/steady/epochs")) == 2, 60, "the run")
        with continuous_requests(url) as statuses:
            code, printed = cli(stack, tmp_path, "projections", "rebuild")
            assert code == 0, printed
        assert set(statuses) == {200}, statuses
        assert statuses[200] > 20

        stack.postgres.stop()
        for path in ("/blueprints", f"/kernels/{'0' * 64}", "/runs/steady"):
            assert int(check_unavailable(api.get(path)).headers["retry-after"]) >= 1
        check_unavailable(api.post("/blueprints/noop/changes", json=CHANGE, headers=key()))
        assert wrong_parts(api) >= {"postgres"}
        assert api.get("/health/live").status_code == 200
        stack.postgres.start()
        wait_until(lambda: api.get("/blueprints").status_code == 200, 30, "reads after Postgres came back")
        wait_until(lambda: api.get("/health/ready").status_code == 200, 60, "readiness after Postgres came back")

        stack.kafka.stop()
        mine = key()
        wait_until(lambda: "kafka" in wrong_parts(api), 30, "readiness to report Kafka")
        check_unavailable(api.post("/blueprints/noop/changes", json=CHANGE, headers=mine))
        assert items(api, "/runs/steady/epochs"), "reads still work"
        stack.kafka.start()
        wait_until(lambda: api.get("/health/ready").status_code == 200, 90, "readiness after Kafka came back")

        def verdict() -> str | None:
            found: str | None = api.post("/blueprints/noop/changes", json=CHANGE, headers=mine).json().get("verdict")
            return found

        assert wait_until(verdict, 60, "the verdict under the same key") == "wrong_version"
        assert "request.failed" not in (tmp_path / "urza.log").read_text()


def check_unavailable(reply: httpx.Response) -> httpx.Response:
    refused(reply, 503)
    assert "retry-after" in reply.headers
    return reply


def wrong_parts(api: httpx.Client) -> set[str]:
    """The dependencies that readiness reports as away."""
    reply = api.get("/health/ready")
    parts = reply.json()["parts"]
    assert (reply.status_code == 503) == any(state != "ok" for state in parts.values())
    return {name for name, state in parts.items() if state != "ok"}


@contextmanager
def continuous_requests(url: str) -> Iterator[Counter[int | str]]:
    """Sends reads that no cached response serves, and changes, without a pause; yields the counts of their statuses."""
    statuses: Counter[int | str] = Counter()
    ended = threading.Event()

    def send_requests() -> None:
        with httpx.Client(base_url=url, timeout=30) as api:
            for n in range(1, 1_000_000):
                if ended.is_set():
                    return
                for path in PATHS:
                    reply = api.get(path, params={"limit": n % 500 + 1})
                    statuses[reply.status_code] += 1
                reply = api.post("/blueprints/noop/changes", json=CHANGE, headers=key())
                statuses[200 if reply.status_code == 202 else reply.status_code] += 1

    thread = threading.Thread(target=send_requests)
    thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        thread.join(60)
