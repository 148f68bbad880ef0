"""The programs of docs/examples and the code blocks that need the stack, run as a reader runs them."""

import asyncio
import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from docs.test_docs import PYTHON, Block
from support.conditions import wait_until
from support.events.event_examples import EXAMPLES
from support.paths import DOCS, ROOT
from support.processes.esper_processes import SCRIPTS, cli, log_of, process, running, worker

from esper.embedded.stack import EmbeddedStack
from esper.oona import OonaProducer
from esper.schemas.events import FieldReported
from esper.schemas.messages import OonaMessage

OWN_LOOP_S = 400.0
BLOCK_S = 120.0


def run_python(stack: EmbeddedStack, folder: Path, *arguments: str, timeout_s: float) -> str:
    """Run a program to its end, with warnings about deprecations as errors; return its output."""
    child = process(stack, folder, "program", sys.executable, "-W", "error::DeprecationWarning:esper", *arguments)
    child.start()
    wait_until(lambda: not child.is_alive, timeout_s, f"the end of {arguments}")
    assert child.returncode == 0, log_of(child)
    return log_of(child)


@pytest.fixture
def services(stack: EmbeddedStack, tmp_path: Path) -> Iterator[None]:
    """A stream worker, Urza and Tamiyo, as the tutorial starts them."""
    esper = str(SCRIPTS / "esper")
    with ExitStack() as exits:
        exits.enter_context(running(worker(stack, tmp_path), "worker.ready"))
        exits.enter_context(running(process(stack, tmp_path, "urza", esper, "serve", "urza"), "urza.ready"))
        exits.enter_context(running(process(stack, tmp_path, "tamiyo", esper, "serve", "tamiyo"), "tamiyo.ready"))
        yield


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("services")
def test_own_loop_grows_and_exports(stack: EmbeddedStack, tmp_path: Path) -> None:
    """The tutorial's program: something grows, `esper why` explains it, the export runs without Esper."""
    run = f"own-{uuid.uuid4().hex[:8]}"
    printed = run_python(stack, tmp_path, str(DOCS / "examples" / "own_loop.py"), run, timeout_s=OWN_LOOP_S)
    assert printed.count("accuracy") == 14
    seeds = re.findall(r"^  (\w+:\d) \w+, blueprint [\w-]+$", printed, re.M)
    assert seeds, printed
    code, why = cli(stack, tmp_path, "why", run, seeds[0])
    assert code == 0, why
    assert "decision" in why
    load = "import torch; print(torch.export.load('grown.pt2').module()(torch.zeros(3, 1, 8, 8)).shape)"
    assert "torch.Size([3, 10])" in run_python(stack, tmp_path, "-c", load, timeout_s=BLOCK_S)


@pytest.mark.timeout(180)
async def test_react_to_events_prints_a_field_report(stack: EmbeddedStack, tmp_path: Path, run_id: str) -> None:
    """The example consumer prints a report that is in the log, and ends at SIGTERM."""
    example = next(e for e in EXAMPLES if isinstance(e, FieldReported))
    report = example.model_copy(update={"run_id": run_id})
    async with OonaProducer(stack.settings().need_kafka(), client_id="test") as oona:
        await oona.send(OonaMessage.of(report, id=uuid.uuid4(), source="test"))
    program, group = str(DOCS / "examples" / "react_to_events.py"), f"test-{uuid.uuid4().hex[:8]}"
    child = process(stack, tmp_path, "consumer", sys.executable, "-u", program, group)
    with running(child, "reading"):
        await asyncio.to_thread(
            wait_until, lambda: f"{run_id}: {report.metric}" in log_of(child), BLOCK_S, "the report"
        )
    assert "Traceback" not in log_of(child)


@pytest.mark.parametrize("block", [b for b in PYTHON if b.mark == "needs the stack"], ids=str)
def test_code_blocks_run_on_the_stack(block: Block, stack: EmbeddedStack, tmp_path: Path) -> None:
    assert block.page.is_relative_to(ROOT)
    run_python(stack, tmp_path, "-c", block.text, timeout_s=BLOCK_S)
