"""Soak test: run writer, broker and reader, and check that memory, file descriptors and the outbox stay flat.

Usage: ``soak.py --minutes 10``. Prints a table and exits with 1 if something grew.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))  # imports of `support`

from support.faults.broker_storm import Storm, storm

SAMPLE_S = 2.0
WARM_UP = 0.25  # share of the time for caches to fill; of the rest the first fifth is compared with the last
GROWTH_BYTES = 12 * 2**20  # noise of the allocator
GROWTH_SHARE = 0.08
GROWTH_FDS = 4

Sample = dict[str, float]


def take_sample(stage: Storm) -> Sample:
    """Bytes and descriptors of every process, and bytes of the outbox on disk."""
    found: Sample = {"numbers applied": stage.applied()}
    for process in (stage.writer, stage.readers[0]):
        usage = psutil.Process(process.pid)
        found[f"{process.name} memory"] = usage.memory_info().rss
        found[f"{process.name} descriptors"] = usage.num_fds()
        found[f"{process.name} threads"] = usage.num_threads()
    found["broker memory"] = psutil.Process(stage.kafka.pid).memory_info().rss
    found["outbox on disk"] = sum(p.stat().st_size for p in (stage.folder / "run").glob("*.sqlite*"))
    return found


def has_grown(name: str, before: float, after: float) -> bool:
    """Whether a value grew by more than noise. Only printed for the broker, whose settings bound its heap."""
    if name == "numbers applied" or name.startswith("broker"):
        return False
    if name.endswith(("descriptors", "threads")):
        return after - before > GROWTH_FDS
    return after - before > max(GROWTH_BYTES, GROWTH_SHARE * before)


def format_value(name: str, value: float) -> str:
    """Bytes in MiB, counts unchanged."""
    return f"{value / 2**20:,.1f} MiB" if name.endswith(("memory", "disk")) else f"{value:,.0f}"


def main() -> int:
    """Run the soak test. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    minutes = parser.parse_args().minutes
    console, samples = Console(width=110), list[Sample]()
    with (
        tempfile.TemporaryDirectory(prefix="esper-soak-", dir="/var/tmp") as folder,
        storm(Path(folder), random.Random(0)) as stage,
    ):
        stage.begin()
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            time.sleep(SAMPLE_S)
            samples.append(take_sample(stage))
        total = stage.settle()
        stage.check(total)
    flat = samples[int(WARM_UP * len(samples)) :]
    fifth = max(1, len(flat) // 5)
    table = Table(title=f"{minutes:g} min, {total:,} numbers, each applied once and in order")
    for column in ("", "after warm-up", "at the end", ""):
        table.add_column(column, justify="right" if column else "left")
    grown = []
    for name in flat[0]:
        before, after = (statistics.median(s[name] for s in part) for part in (flat[:fifth], flat[-fifth:]))
        if has_grown(name, before, after):
            grown.append(name)
        table.add_row(name, format_value(name, before), format_value(name, after), "GREW" if name in grown else "")
    console.print(table)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
