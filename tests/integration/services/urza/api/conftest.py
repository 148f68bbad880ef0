"""A worker, an Urza that serves its own host, and one that requires tokens: for all tests of the API."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes.esper_processes import running, worker
from support.processes.urza_server import TOKENS, running_urza
from support.stacks import running_stack

from esper.embedded.stack import EmbeddedStack


@pytest.fixture(scope="package")
def stack() -> Iterator[EmbeddedStack]:
    """A stack of these tests alone: on a shared one other tests certify blueprints without a certificate."""
    with running_stack() as own:
        yield own


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes log: worker.log, urza.log, guarded.log."""
    return tmp_path_factory.mktemp("urza")


@pytest.fixture(scope="package")
def url(stack: EmbeddedStack, folder: Path) -> Iterator[str]:
    """The address of an Urza without tokens; a worker runs too."""
    with running(worker(stack, folder), "worker.ready"), running_urza(stack, folder) as address:
        yield address


@pytest.fixture(scope="package")
def guarded(stack: EmbeddedStack, url: str, folder: Path) -> Iterator[str]:
    """The address of an Urza that serves other hosts and requires a token."""
    with running_urza(stack, folder, "guarded", **TOKENS, ESPER_URZA__HOST="0.0.0.0") as address:
        yield f"http://127.0.0.1:{address.rpartition(':')[2]}"
