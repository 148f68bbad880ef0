"""Urza as a user starts it, with a worker beside it, for tests of its API."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from processes import SCRIPTS, log_of, process, running, worker
from waiting import wait_until

from esper.embedded.stack import EmbeddedStack

READY_S = 90.0


@contextmanager
def running_urza(stack: EmbeddedStack, folder: Path, name: str = "urza", **env: str) -> Iterator[str]:
    """`esper serve urza`, ready; gives its address. A worker has to run."""
    child = process(stack, folder, name, str(SCRIPTS / "esper"), "serve", "urza", **env)
    with running(child, "urza.ready"):
        url = log_of(child).split("url=")[1].split()[0]
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200, READY_S, "Urza's readiness")
        yield url


@contextmanager
def urza_and_worker(stack: EmbeddedStack, folder: Path, **env: str) -> Iterator[str]:
    """Both, and Urza's address."""
    with ExitStack() as exits:
        exits.enter_context(running(worker(stack, folder), "worker.ready"))
        yield exits.enter_context(running_urza(stack, folder, **env))
