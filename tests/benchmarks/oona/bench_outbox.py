"""Cost of an event in a trainer's outbox: append (full sync), read and remove, one by one and in groups."""

import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

from bus_hold import health_event
from rich.console import Console
from rich.table import Table

from esper.oona.cloudevents import encode
from esper.oona.outbox.outbox_store import Outbox

GROUPS = {1: 300, 10: 60, 100: 20, 1_000: 5}  # events per append -> number of appends


def plain_append_us(path: Path, num_events: int, value: bytes) -> float:
    """Append the same bytes to an SQLite table without a sync, as the baseline for the cost of syncs."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=OFF")
    database.execute("CREATE TABLE plain (id INTEGER PRIMARY KEY, value BLOB)")
    began = time.perf_counter()
    for _n in range(50):
        database.execute("BEGIN")
        database.executemany("INSERT INTO plain (value) VALUES (?)", [(value,)] * num_events)
        database.execute("COMMIT")
    taken = time.perf_counter() - began
    database.close()
    return 1e6 * taken / 50 / num_events


def main() -> None:
    """Print a table."""
    record = encode(health_event(0))
    table = Table(title=f"outbox, events of {record.size_bytes} bytes")
    for column in ("events/append", "ms an append (p50)", "us an event", "plain SQLite, no sync: us", "ratio"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="esper-bench-", dir="/var/tmp") as folder:
        outbox = Outbox(Path(folder) / "outbox.sqlite")
        outbox.open()
        for size, repeats in GROUPS.items():
            times = []
            for _n in range(repeats):
                began = time.perf_counter()
                outbox.append([record] * size)
                times.append(time.perf_counter() - began)
            plain = plain_append_us(Path(folder) / f"plain-{size}.sqlite", size, record.value or b"")
            event_us = 1e6 * statistics.median(times) / size
            cells = (1e3 * statistics.median(times), event_us, plain, event_us / plain)
            table.add_row(f"{size:,}", *(f"{c:.2f}" if c < 10 else f"{c:,.0f}" for c in cells))
        total, began = len(outbox), time.perf_counter()
        while waiting := outbox.oldest(500):
            outbox.remove_up_to(waiting[-1][0])
        read_us = 1e6 * (time.perf_counter() - began) / total
        outbox.close()
    console = Console(width=110)
    console.print(table)
    console.print(f"read and removed, 500 at a time: {read_us:.0f} us/event ({total:,} events)")


if __name__ == "__main__":
    main()
