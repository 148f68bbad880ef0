"""The outbox compared with a list, through crashes and on a full disk; and its commands."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes.esper_processes import cli
from support.processes.separate_broker import new_topic
from support.processes.small_disk import end_of, on_small_disk

from esper.embedded.stack import EmbeddedStack
from esper.errors import ContractError, OutboxFullError, UnavailableError
from esper.oona.log_reader import read_range
from esper.oona.outbox.outbox_store import Outbox, num_waiting_in
from esper.oona.records import RECORD_LIMIT_BYTES, Record

APPEND = """
import sys
from pathlib import Path
from esper.oona.records import Record
from esper.oona.outbox.outbox_store import Outbox
outbox = Outbox(Path(sys.argv[1]))
outbox.open()
for n in range(1_000_000):
    outbox.append([Record("t", b"k", str(n).encode(), (("h", b"v"),), n)])
    print(n, flush=True)
"""
RECORDS = st.builds(
    Record, st.sampled_from(["a", "b"]), st.none() | st.binary(max_size=5), st.none() | st.binary(max_size=3_000),
    st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5)), max_size=2).map(tuple),
    st.integers(0, 2**41), st.none(),
)  # fmt: skip
STEPS = st.lists(
    st.tuples(st.just("append"), st.lists(RECORDS, max_size=4), st.dictionaries(st.sampled_from("xy"), st.text(max_size=4)))
    | st.tuples(st.sampled_from(["remove", "refuse"]), st.integers(1, 5))
    | st.tuples(st.sampled_from(["crash", "close"])),
    max_size=25,
)  # fmt: skip


def record(number: int, size: int = 10) -> Record:
    return Record("t", b"k", str(number).encode().ljust(size), (("ce_id", b"x"),), number)


def refused_in(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT topic, key, value, timestamp_ms, reason FROM refused ORDER BY id").fetchall()


def opened(path: Path, **options: Any) -> Outbox:
    outbox = Outbox(path, **options)
    outbox.open()
    return outbox


@settings(max_examples=20, deadline=None)
@given(STEPS)
def test_outbox_matches_a_list_model(steps: list[Any]) -> None:
    model: list[Record] = []
    metadata: dict[str, str] = {}
    refused: list[tuple[Any, ...]] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "o.sqlite"
        outboxes = [opened(path)]
        for step in steps:
            outbox = outboxes[-1]
            match step:
                case "append", records, named:
                    outbox.append(records, named)
                    model += records
                    metadata |= named
                case "remove", count if model:
                    outbox.remove_up_to(outbox.oldest(count)[-1][0])
                    del model[:count]
                case "refuse", _count if model:
                    number, first = outbox.oldest(1)[0]
                    outbox.copy_to_refused(number, "why")
                    outbox.remove_up_to(number)
                    refused.append((first.topic, first.key, first.value, first.timestamp_ms, "why"))
                    del model[0]
                case ("crash",):
                    outboxes.append(opened(path))  # as after a crash: the open connections are never used again
                case ("close",):
                    outbox.close()
                    outboxes[-1] = opened(path)
            assert [r for _id, r in outboxes[-1].oldest(1_000)] == model
            assert len(outboxes[-1]) == len(model)
            assert outboxes[-1].metadata() == metadata
        for outbox in outboxes:
            outbox.close()
        assert refused_in(path) == refused
        assert num_waiting_in(path) == len(model)


def test_outbox_survives_sigkill_in_order(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", APPEND, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    printed = [int(writer.stdout.readline()) for _n in range(200)]
    writer.send_signal(signal.SIGKILL)
    printed += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    writer.wait(10)
    writer.stdout.close()
    outbox = opened(path)
    values = [int(r.value or b"") for _id, r in outbox.oldest(1_000_000)]
    outbox.close()
    assert values == list(range(len(values)))
    assert 0 <= len(values) - len(printed) <= 1, "only the record that was being written may be stored and not printed"


def test_outbox_appends_all_or_nothing_at_its_size_limit(tmp_path: Path) -> None:
    outbox = opened(tmp_path / "outbox.sqlite", max_pages=64)
    count = 0
    with pytest.raises(OutboxFullError, match="free disk space"):
        while True:
            outbox.append([record(count, 2_000), record(count + 1, 2_000)])
            count += 2
    assert len(outbox) == count > 50
    outbox.remove_up_to(outbox.oldest(20)[-1][0])
    outbox.append([record(count)])
    assert len(outbox) == count - 20 + 1
    outbox.close()


def test_outbox_refuses_a_batch_with_a_too_large_record(tmp_path: Path) -> None:
    outbox = opened(tmp_path / "outbox.sqlite")
    for large in (record(1, RECORD_LIMIT_BYTES), record(1)._replace(key=b"k" * RECORD_LIMIT_BYTES)):
        with pytest.raises(ContractError, match="too large"):
            outbox.append([record(0), large])
    assert len(outbox) == 0
    outbox.close()


@pytest.mark.parametrize("damage", ["no database", "a torn header"])
def test_outbox_reports_a_damaged_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "outbox.sqlite"
    outbox = opened(path)
    outbox.append([record(0)])
    outbox.close()
    whole = path.read_bytes()
    path.write_bytes(b"no database at all" * 300 if damage == "no database" else b"\xff" * 100 + whole[100:])
    with pytest.raises(UnavailableError, match=r"cannot be opened.*not Esper's, move it away"):
        outbox.open()
    with pytest.raises(UnavailableError, match="cannot be read as an outbox"):
        num_waiting_in(path)


def test_append_does_not_wait_for_readers_or_the_sender(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    outbox = opened(path)
    outbox.append([record(0)])
    with closing(sqlite3.connect(path, isolation_level=None)) as reader, outbox._sender_lock:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM outbox").fetchone() == (1,)
        outbox.append([record(1)], {"name": "value"})
        assert outbox.metadata() == {"name": "value"}
        assert reader.execute("SELECT count(*) FROM outbox").fetchone() == (1,), "its snapshot is unchanged"
    assert [r for _id, r in outbox.oldest(9)] == [record(0), record(1)]
    outbox.close()


def test_outbox_rewrites_a_truncated_reserve(tmp_path: Path) -> None:
    reserve = tmp_path / "outbox.reserve"
    reserve.write_bytes(b"")
    opened(tmp_path / "outbox.sqlite").close()
    assert reserve.stat().st_size > 0


def test_outbox_sends_on_a_full_disk(stack: EmbeddedStack, tmp_path: Path) -> None:
    child = on_small_disk(stack, tmp_path, "outbox")
    child.start()
    printed = end_of(child)
    assert printed.count("outbox.reserve_failed") <= 1, "logged once"


async def test_outbox_command_lists_and_sends_in_order(stack: EmbeddedStack, tmp_path: Path) -> None:
    kafka = stack.settings().need_kafka()
    topic = await new_topic(kafka, 1)
    for run, name, numbers in (("run-1", "outbox", range(1_200)), ("run-2", "telemetry", range(3))):
        outbox = opened(tmp_path / run / f"{name}.sqlite")
        outbox.append([record(n)._replace(topic=topic.name) for n in numbers])
        outbox.close()

    async def esper(*arguments: str) -> tuple[int, str]:
        return await asyncio.to_thread(cli, stack, tmp_path, "outbox", *arguments)

    code, listed = await esper("list", str(tmp_path))
    assert code == 0, listed
    assert [line.split()[0] for line in listed.splitlines()] == ["1,200", "3"]
    code, printed = await esper("send", str(tmp_path / "run-1"))
    assert (code, printed.split()[0]) == (0, "1,200"), printed
    assert [int(r.value or b"") async for r in read_range(kafka, topic)] == list(range(1_200))
    _code, listed = await esper("list", str(tmp_path))
    assert [line.split()[0] for line in listed.splitlines()] == ["0", "3"]
    code, printed = await esper("send", str(tmp_path / "nowhere"))
    assert code != 0
    assert "no outbox.sqlite in it; name the folder of a run" in " ".join(printed.split())
    assert "Traceback" not in printed
