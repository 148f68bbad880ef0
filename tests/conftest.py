"""Fixtures of all tests: one embedded stack per session, and stacks and databases for tests that need their own."""

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

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads slow each other down on busy cores

FAULTS = Path(__file__).parent / "faults"

hypothesis.settings.register_profile("esper", deadline=None)  # the speed of the machine is not under test
hypothesis.settings.load_profile("esper")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that are marked slow (make test-slow)")
    parser.addoption("--hide", action="append", default=[], help="make the import of this package fail")
    parser.addoption("--fault-rounds", type=int, default=4, help="rounds of the fault tests")
    parser.addoption("--fault-steps", type=int, default=300, help="training steps in which seeds fail at random")
    parser.addoption("--s3-operations", type=int, default=200, help="operations of the S3 fault test")
    parser.addoption("--fault-seed", type=int, default=random.randrange(10**6), help="random seed of the faults")


def pytest_configure(config: pytest.Config) -> None:
    """Make the import of hidden packages fail, as if they were not installed."""
    sys.modules.update(dict.fromkeys(config.getoption("--hide")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests without --slow.

    All fault tests count as slow, since they have their own make targets; those that are marked slow also need many
    rounds.
    """
    with_slow = config.getoption("--slow")
    with_long_faults = with_slow and config.getoption("--fault-rounds") >= LONG_FAULT_ROUNDS

    def is_deselected(item: pytest.Item) -> bool:
        is_slow = item.get_closest_marker("slow") is not None
        if FAULTS in item.path.parents:
            return not (with_long_faults if is_slow else with_slow)
        return is_slow and not with_slow

    deselected = [item for item in items if is_deselected(item)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="session")
def stack() -> Iterator[EmbeddedStack]:
    """A real Kafka, Postgres and S3 with topics and tables, shared by the session."""
    with running_stack() as running:
        yield running


@pytest.fixture
def settings(stack: EmbeddedStack) -> Settings:
    """Settings of the session's stack."""
    return stack.settings()


@pytest.fixture
def run_id() -> str:
    """A run id that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def own_database(stack: EmbeddedStack) -> PostgresSettings:
    """A separate, migrated database, for tests that project the whole log or break tables."""
    return new_database(stack)


@pytest.fixture
def fresh_stack() -> Iterator[EmbeddedStack]:
    """A separate stack, for tests that break it."""
    with running_stack() as running:
        yield running


@pytest.fixture(scope="module")
def log() -> Iterator[EmbeddedStack]:
    """A stack whose log has only the runs of one test module."""
    with running_stack() as own:
        yield own


@pytest.fixture
def mine(log: EmbeddedStack) -> Settings:
    """Settings of the module's stack, with a separate database for each test."""
    return Settings.model_validate({**log.sections(), "postgres": new_database(log)})
