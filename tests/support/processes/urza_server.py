"""Urza and a worker, started as a user starts them, for tests of the API."""

import asyncio
import hashlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from support.conditions import wait_until
from support.processes.esper_processes import SCRIPTS, log_of, process, running, worker

from esper.embedded.stack import EmbeddedStack
from esper.oona.producer import OonaProducer
from esper.schemas.messages import OonaMessage

READY_S = 90.0
LONG_TIMEOUTS = {"ESPER_URZA__CHANGE_TIMEOUT_S": "20"}
"""Timeouts that are long enough for a verdict on a busy machine."""
PROBLEM = "application/problem+json"
WRITER, READER = "w" * 40, "r" * 40
TOKENS = {
    "ESPER_URZA__WRITER_TOKENS_SHA256": hashlib.sha256(WRITER.encode()).hexdigest(),
    "ESPER_URZA__READER_TOKENS_SHA256": hashlib.sha256(READER.encode()).hexdigest(),
}


@contextmanager
def running_urza(stack: EmbeddedStack, folder: Path, name: str = "urza", **env: str) -> Iterator[str]:
    """Run `esper serve urza`. Yields its address once it is ready, which takes a running worker."""
    child = process(stack, folder, name, str(SCRIPTS / "esper"), "serve", "urza", **{**LONG_TIMEOUTS, **env})
    with running(child, "urza.ready"):
        url = log_of(child).split("url=")[1].split()[0]
        wait_until(lambda: httpx.get(f"{url}/health/ready", timeout=30).status_code == 200, READY_S, "Urza's readiness")
        yield url


@contextmanager
def urza_and_worker(stack: EmbeddedStack, folder: Path, **env: str) -> Iterator[str]:
    """Run a worker and Urza. Yields Urza's address."""
    with ExitStack() as exits:
        exits.enter_context(running(worker(stack, folder), "worker.ready"))
        yield exits.enter_context(running_urza(stack, folder, **env))


def send(stack: EmbeddedStack, messages: Sequence[OonaMessage]) -> None:
    """Write events to the log."""

    async def now() -> None:
        async with OonaProducer(stack.settings().need_kafka()) as producer:
            await producer.send_batch(messages)

    asyncio.run(now())


def items(api: httpx.Client, path: str, limit: int = 100, **filters: Any) -> list[dict[str, Any]]:
    """All items of a list, read page by page."""
    found: list[dict[str, Any]] = []
    reply = api.get(path, params={"limit": limit, **filters})
    while reply.status_code == 200:
        page = reply.json()
        found += page["items"]
        if page["next"] is None:
            return found
        assert len(page["items"]) == limit
        reply = api.get(page["next"])
    return []


def refused(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The problem of a response, which must be an error."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, PROBLEM), reply.text
    problem: dict[str, Any] = reply.json()
    assert problem["status"] == status
    assert problem["detail"]
    return problem


def key() -> dict[str, str]:
    return {"Idempotency-Key": f"test-{uuid.uuid4()}"}
