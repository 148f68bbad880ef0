"""Urza's API against its own OpenAPI document, by schemathesis: every response matches the document.

Runs it as its users do, on a real server with a worker, a run that grew, and tokens. More examples and another
seed: ``--max-examples`` and ``--seed`` in SCHEMATHESIS_EXTRA, which comes last.
"""

import os
from pathlib import Path

import httpx
import pytest
from support.conditions import wait_until
from support.events.grown_run_events import grown_run_messages
from support.processes.esper_processes import SCRIPTS, log_of, process
from support.processes.urza_server import WRITER, send

from esper.embedded.stack import EmbeddedStack

pytestmark = pytest.mark.slow

RUN = "digits-demo"  # the run of the document's examples
AS_WRITER = {"Authorization": f"Bearer {WRITER}"}
LIMIT_S = 240.0  # a broken server hangs; a sound one takes about 30 s on a free machine
OPTIONS = (
    "--checks=all", "--phases=examples,coverage,fuzzing,stateful", "--max-examples=5", "--seed=1",
    "--continue-on-failure", "--generation-database=none", "--no-color", "--request-timeout=30",
)  # fmt: skip


@pytest.mark.timeout(420)
def test_schemathesis_finds_nothing(guarded: str, stack: EmbeddedStack, folder: Path, tmp_path: Path) -> None:
    _fill(stack, guarded)
    extra = os.environ.get("SCHEMATHESIS_EXTRA", "").split()
    command = (str(SCRIPTS / "schemathesis"), "run", f"{guarded}/openapi.json", *OPTIONS, *extra)
    child = process(stack, tmp_path, "schemathesis", *command, f"--header=Authorization:{AS_WRITER['Authorization']}")
    child.start()
    wait_until(lambda: not child.is_alive, LIMIT_S, "the end of schemathesis")
    printed = log_of(child)
    assert child.returncode == 0, printed
    assert "No issues found" in printed, printed
    assert "WARNING" not in printed.upper(), printed  # e.g. an operation that answered with 404 alone
    assert "request.failed" not in (folder / "guarded.log").read_text()


def _fill(stack: EmbeddedStack, url: str) -> None:
    """Write a run with its decisions, and wait for a kernel for its layers."""
    send(stack, grown_run_messages(RUN))
    with httpx.Client(base_url=url, headers=AS_WRITER, timeout=30) as api:
        for path in (f"/runs/{RUN}/reports", f"/runs/{RUN}/decisions", "/kernels?num_features=8"):
            wait_until(lambda path=path: api.get(path).json().get("items"), 60, path)
