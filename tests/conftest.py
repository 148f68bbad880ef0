"""What all tests share: one embedded stack a session, one fresh database a test."""

import os
import random
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import `support`

from support.stacks import LONG_FAULT_ROUNDS, new_database, running_stack

from esper.config import PostgresSettings, Settings
from esper.embedded.stack import EmbeddedStack

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other when the cores are busy

FAULTS = Path(__file__).parent / "faults"

hypothesis.settings.register_profile("esper", deadline=None)  # how fast the machine is says nothing about an example
hypothesis.settings.load_profile("esper")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="with the tests that are marked slow: make test-slow")
    parser.addoption("--hide", action="append", default=[], help="a package that cannot be imported")
    parser.addoption("--fault-rounds", type=int, default=4, help="rounds of the fault suite")
    parser.addoption("--fault-steps", type=int, default=300, help="training steps in which seeds fail at random")
    parser.addoption("--s3-operations", type=int, default=200, help="operations of the S3 storm")
    parser.addoption("--fault-seed", type=int, default=random.randrange(10**6), help="which faults, and when")


def pytest_configure(config: pytest.Config) -> None:
    """Hide packages: importing one fails as if it were not installed."""
    sys.modules.update(dict.fromkeys(config.getoption("--hide")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless it is asked for.

    So are all fault suites: they have targets of their own. What is slow among them takes many rounds, too.
    """
    wants_slow = config.getoption("--slow")
    wants_long_faults = wants_slow and config.getoption("--fault-rounds") >= LONG_FAULT_ROUNDS

    def is_left_out(item: pytest.Item) -> bool:
        is_slow = item.get_closest_marker("slow") is not None
        if FAULTS in item.path.parents:
            return not (wants_long_faults if is_slow else wants_slow)
        return is_slow and not wants_slow

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def stack() -> Iterator[EmbeddedStack]:
    """The real Kafka, Postgres and S3, with topics and tables in place."""
    with running_stack() as running:
        yield running


@pytest.fixture
def settings(stack: EmbeddedStack) -> Settings:
    """Settings that point at the session's stack."""
    return stack.settings()


@pytest.fixture
def run_id() -> str:
    """A run nobody else uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def own_database(stack: EmbeddedStack) -> PostgresSettings:
    """A database of the test's own, migrated, for tests that fold the whole log or break tables."""
    return new_database(stack)


@pytest.fixture
def fresh_stack() -> Iterator[EmbeddedStack]:
    """A stack of the test's own, ready for use: for tests that break it."""
    with running_stack() as running:
        yield running


@pytest.fixture(scope="module")
def log() -> Iterator[EmbeddedStack]:
    """A stack whose log holds nothing but one module's runs."""
    with running_stack() as own:
        yield own


@pytest.fixture
def mine(log: EmbeddedStack) -> Settings:
    """Settings with that log, and a database of the test's own."""
    return Settings.model_validate({**log.sections(), "postgres": new_database(log)})
