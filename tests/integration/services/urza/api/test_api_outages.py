"""Urza's API while what it needs is away, and while its tables are exchanged: on a stack that is the test's own."""

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
ASKED = (
    "/blueprints",
    "/kernels",
    "/runs/steady/epochs",
    "/blueprints/affine/reports",
    "/blueprints/affine/certificates",
)


@pytest.mark.timeout(300)
def test_a_rebuild_fails_no_request_and_what_is_away_is_named_until_it_is_back(
    fresh_stack: EmbeddedStack, tmp_path: Path
) -> None:
    stack = fresh_stack
    with urza_and_worker(stack, tmp_path) as url, httpx.Client(base_url=url, timeout=30) as api:
        send(stack, grown_run_messages("steady"))
        wait_until(lambda: len(items(api, "/runs/steady/epochs")) == 2, 60, "the run")
        with asked_all_the_time(url) as answers:
            code, printed = cli(stack, tmp_path, "projections", "rebuild")
            assert code == 0, printed
        assert set(answers) == {200}, answers
        assert answers[200] > 20

        stack.postgres.stop()
        for path in ("/blueprints", f"/kernels/{'0' * 64}", "/runs/steady"):
            assert int(is_away(api.get(path)).headers["retry-after"]) >= 1
        is_away(api.post("/blueprints/noop/changes", json=CHANGE, headers=key()))
        assert wrong_parts(api) >= {"postgres"}
        assert api.get("/health/live").status_code == 200
        stack.postgres.start()
        wait_until(lambda: api.get("/blueprints").status_code == 200, 30, "reads after Postgres came back")
        wait_until(lambda: api.get("/health/ready").status_code == 200, 60, "readiness after Postgres came back")

        stack.kafka.stop()
        mine = key()
        wait_until(lambda: "kafka" in wrong_parts(api), 30, "the word that Kafka is away")
        is_away(api.post("/blueprints/noop/changes", json=CHANGE, headers=mine))
        assert items(api, "/runs/steady/epochs"), "reads go on"
        stack.kafka.start()
        wait_until(lambda: api.get("/health/ready").status_code == 200, 90, "readiness after Kafka came back")

        def verdict() -> str | None:
            found: str | None = api.post("/blueprints/noop/changes", json=CHANGE, headers=mine).json().get("verdict")
            return found

        assert wait_until(verdict, 60, "the verdict under the same key") == "wrong_version"
        assert "request.failed" not in (tmp_path / "urza.log").read_text()


def is_away(reply: httpx.Response) -> httpx.Response:
    refused(reply, 503)
    assert "retry-after" in reply.headers
    return reply


def wrong_parts(api: httpx.Client) -> set[str]:
    """What readiness says is away."""
    reply = api.get("/health/ready")
    parts = reply.json()["parts"]
    assert (reply.status_code == 503) == any(state != "ok" for state in parts.values())
    return {name for name, state in parts.items() if state != "ok"}


@contextmanager
def asked_all_the_time(url: str) -> Iterator[Counter[int | str]]:
    """Reads that no kept answer serves, and a change, again and again; gives how they were answered."""
    answers: Counter[int | str] = Counter()
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=30) as api:
            for n in range(1, 1_000_000):
                if ended.is_set():
                    return
                for path in ASKED:
                    reply = api.get(path, params={"limit": n % 500 + 1})
                    answers[reply.status_code] += 1
                reply = api.post("/blueprints/noop/changes", json=CHANGE, headers=key())
                answers[200 if reply.status_code == 202 else reply.status_code] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join(60)
