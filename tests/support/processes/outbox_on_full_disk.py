"""Outbox and training on a full disk: a script for tests/support/processes/small_disk.py.

Usage: ``outbox_on_full_disk.py outbox FOLDER`` or ``outbox_on_full_disk.py training FOLDER RUN_ID SIGNALS``. FOLDER is
on a small tmpfs; SIGNALS is a folder outside of it, in which test and script create files to signal their progress.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from support.conditions import wait_until

from esper.errors import OutboxFullError
from esper.oona.outbox.outbox_store import RESERVE_BYTES, Outbox
from esper.oona.records import Record


def report(*words: object) -> None:
    print(*words, flush=True)


def record(number: int) -> Record:
    return Record("t", b"k", str(number).encode().ljust(2_000), (("ce_id", b"x"),), number)


def append_until_full(outbox: Outbox, number: int) -> int:
    """Append until the disk is full. Returns the first number that did not fit."""
    try:
        while True:
            outbox.append([record(number), record(number + 1)])
            number += 2
    except OutboxFullError:
        return number


def fill_disk(filler: Path) -> None:
    """Fill the remaining space."""
    with filler.open("ab", buffering=0) as file:
        for size in (65_536, 4_096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def try_outbox(folder: Path) -> None:
    path, filler = folder / "outbox.sqlite", folder / "filler"
    reserve = path.with_suffix(".reserve")
    filler.write_bytes(bytes(12 * 1024 * 1024))
    outbox = Outbox(path)
    outbox.open()
    assert reserve.stat().st_size == RESERVE_BYTES
    appended, removed = append_until_full(outbox, 0), 0
    fill_disk(filler)
    assert len(outbox) == appended > 500
    report("full", appended)
    lowest = RESERVE_BYTES
    for _round in range(3):  # send, append into the space that this frees, and repeat
        for _n in range(40):
            waiting = outbox.oldest(5)
            assert [int(r.value or b"") for _id, r in waiting] == list(range(removed, removed + 5))
            outbox.remove_up_to(waiting[-1][0])
            removed += 5
            lowest = min(lowest, reserve.stat().st_size if reserve.exists() else 0)
        before, appended = appended, append_until_full(outbox, appended)
        assert appended > before, "removed events did not free space"
        assert len(outbox) == appended - removed
    outbox.close()
    fill_disk(filler)
    outbox = Outbox(path)  # what the next process finds
    outbox.open()
    for _n in range(40):
        waiting = outbox.oldest(5)
        outbox.remove_up_to(waiting[-1][0])
        removed += 5
        lowest = min(lowest, reserve.stat().st_size if reserve.exists() else 0)
    assert lowest == 0, "the reserved space was not freed"
    assert len(outbox) == appended - removed
    filler.unlink()
    while waiting := outbox.oldest(100):
        assert [int(r.value or b"") for _id, r in waiting] == list(range(removed, removed + len(waiting)))
        outbox.remove_up_to(waiting[-1][0])
        removed += len(waiting)
    assert removed == appended, "events lost or duplicated"
    assert reserve.stat().st_size == RESERVE_BYTES, "space not reserved again"
    outbox.append([record(appended)], {"name": "kept"})
    assert outbox.metadata() == {"name": "kept"}
    outbox.close()
    report("whole")


def train(folder: Path, run_id: str, signals: Path) -> None:
    import torch
    from torch import nn

    import esper
    from esper.connection.settings import LinkOptions
    from esper.schemas.enums import SeedStage

    model = esper.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), seeds_per_layer=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = LinkOptions.model_validate({"boundary_steps": 5, "health_interval_steps": 1, "folder": folder})
    with esper.connect(model, optimizer, run_id=run_id, options=options) as run:

        def steps(count: int) -> float:
            slowest = 0.0
            for _n in range(count):
                optimizer.zero_grad()
                model(torch.ones(4, 6)).sum().backward()
                optimizer.step()
                began = time.monotonic()
                run.step()
                slowest = max(slowest, time.monotonic() - began)
            return slowest

        def has_signal(name: str) -> bool:
            return (signals / name).exists()

        steps(4)
        report("send a command")
        wait_until(lambda: has_signal("sent") and has_command(run), 60, "the command")
        report("stop the broker")
        wait_until(lambda: has_signal("stopped"), 60)
        fill_disk(folder / "filler")
        fill_free_pages(run._outbox)
        slowest = steps(16)  # boundaries 1 to 4
        assert run.step_number == 20
        assert model.seed("0", 0).stage is SeedStage.DORMANT, "a seed grew, and its event was lost"
        assert not run.checkpoint()
        (folder / "filler").unlink()
        steps(5)
        assert model.seed("0", 0).stage is SeedStage.GERMINATED
        report(f"slowest step {slowest:.3f} s")
        report("start the broker")
        wait_until(lambda: has_signal("started"), 60)
    report("whole")


def has_command(run: Any) -> bool:
    return bool(run._inbox._waiting)


def fill_free_pages(outbox: Outbox) -> None:
    """Fill the free pages of the database file too."""
    from esper.schemas.topics import RUNS

    for size in (2_000, 1):
        try:
            while True:
                outbox.append([Record(RUNS.dead_letters.name, b"junk", b"x" * size, (), 0)])
        except OutboxFullError:
            continue


if __name__ == "__main__":
    os.umask(0o077)
    match sys.argv[1:]:
        case ["outbox", where]:
            try_outbox(Path(where))
        case ["training", where, run, signals_at]:
            train(Path(where), run, Path(signals_at))
