"""The private methods of Faust that Esper overrides or relies on: a test fails when an upgrade changes one.

After a failure read the new source, compare it with streams/worker/faust_batches.py and docs/design/stream-worker.md,
run `make faults-streams`, and only then write the new digest here.
"""

import hashlib
import inspect
import re
from importlib.metadata import requires, version
from pathlib import Path

import faust
import pytest
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer as BaseConsumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from packaging.requirements import Requirement
from support.paths import ROOT

from esper.config import Settings
from esper.streams.worker import app
from esper.streams.worker.app import EsperApp, build_app
from esper.streams.worker.faust_batches import BatchConsumer, BatchSchema, BatchTransport

VERSION = "0.15.3"
DIGESTS = {
    # overridden
    faust.App._new_transport: "42db531312dd",
    faust.App._create_directories: "a9f571c3b04a",
    BaseConsumer.getmany: "4b168d84882a",
    BaseConsumer.perform_seek: "0e8c130ff4b0",
    BaseConsumer._wait_next_records: "6218e1969a63",
    BaseConsumer._new_offset: "1d2c7ea89a7a",
    BaseConsumer._add_gap: "4df2573ded7c",
    AIOKafkaConsumerThread.seek_to_committed: "775ab0adc4b0",
    faust.Schema.compile: "d46eec5ce319",
    # relied on: the callers of overridden methods, and the methods that these call on the client
    BaseConsumer._drain_messages: "44a2500309e8",
    BaseConsumer.ack: "5fcf41cf4515",
    Recovery._resume_streams: "d986a6710c1a",
    Recovery.on_recovery_completed: "6ef567acf072",
    AIOKafkaConsumerThread._seek_wait: "9d221e816d94",
    AIOKafkaConsumerThread.earliest_offsets: "5d697cd76873",
    AIOKafkaConsumerThread._highwaters: "a7f4f97d9f32",
    AIOKafkaConsumerThread._create_worker_consumer: "c2701bfc3e6f",
}


def digest(function: object) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]  # type: ignore[arg-type]


def test_faust_version_is_pinned_exactly() -> None:
    assert version("faust-streaming") == VERSION
    wanted = [Requirement(text) for text in requires("esper") or ()]
    (pinned,) = {str(r.specifier) for r in wanted if r.name == "faust-streaming"}
    assert pinned == f"=={VERSION}"


@pytest.mark.parametrize("function", DIGESTS, ids=lambda f: f.__qualname__)
def test_faust_source_has_the_reviewed_digest(function: object) -> None:
    assert digest(function) == DIGESTS[function]  # type: ignore[index]


@pytest.mark.parametrize(
    ("ours", "stock"), [(BatchConsumer, Consumer), (BatchTransport, Transport), (BatchSchema, faust.Schema)]
)
def test_overrides_match_faust_methods(ours: type, stock: type) -> None:
    added = {"_seek_again", "has_in_flight"}
    own = {n for n, v in vars(ours).items() if inspect.isfunction(v) and n != "__init__"} - added
    assert {n for n in own if not hasattr(stock, n)} == set()
    for name in own - {"compile"}:
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(
            inspect.signature(getattr(stock, name)).parameters
        ), name


def test_page_names_every_override() -> None:
    page = (ROOT / "docs" / "design" / "stream-worker.md").read_text()
    for ours in (BatchConsumer, BatchSchema, EsperApp):
        stock = ours.__mro__[1]
        for name, value in vars(ours).items():
            if inspect.isfunction(value) and hasattr(stock, name) and not name.startswith("__"):
                assert f"`{name}`" in page, f"{ours.__name__}.{name}"


def test_page_names_existing_tests() -> None:
    page = (ROOT / "docs" / "design" / "stream-worker.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for path, function in named:
        assert (f"def {function}(" if function else "def test_") in (ROOT / path).read_text(), f"{path}::{function}"


def test_page_names_a_test_for_every_failure_mode() -> None:
    page = (ROOT / "docs" / "design" / "stream-worker.md").read_text()
    rows = [
        line
        for line in page.split("## Failure modes", 1)[1].splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    assert len(rows) > 15
    assert [line for line in rows[1:] if "`tests/" not in line] == []


async def test_app_creates_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faust creates NAME-data in the working directory; a reader's folder stays as it is."""
    monkeypatch.chdir(tmp_path)
    await build_app(Settings.model_validate({"source": "the test"})).on_first_start()
    assert list(tmp_path.iterdir()) == []


def test_app_has_the_settings_of_the_page() -> None:
    conf = build_app(Settings.model_validate({"source": "the test"})).conf
    assert (conf.topic_disable_leader, conf.topic_allow_declare, conf.web_enabled) == (True, False, False)
    assert (conf.worker_redirect_stdouts, conf.stream_wait_empty) == (False, False)
    assert (str(conf.store), str(conf.processing_guarantee.value)) == ("memory:", "at_least_once")
    assert conf.consumer_auto_offset_reset == "earliest"
    agent = inspect.getsource(app._projection_agent)
    assert "stream.noack().events()" in agent
    assert ".take(" not in agent
