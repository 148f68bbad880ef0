"""Compression codecs for telemetry: bytes and time of a batch of 100 layer reports, as aiokafka builds it."""

import random
import time

from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from bus_hold import health_event
from rich.console import Console
from rich.table import Table

from esper.oona.cloudevents import encode

BATCH = 100
REPEATS = 40
CODECS = {
    "none": 0,
    "lz4": DefaultRecordBatch.CODEC_LZ4,
    "snappy": DefaultRecordBatch.CODEC_SNAPPY,
    "zstd": DefaultRecordBatch.CODEC_ZSTD,
    "gzip": DefaultRecordBatch.CODEC_GZIP,
}


def main() -> None:
    """Print a table for small and large reports."""
    rng = random.Random(0)
    table = Table(title=f"batch of {BATCH} layer reports")
    for column in ("seeds a layer", "codec", "bytes/event", "of plain", "write us/event", "read us/event"):
        table.add_column(column, justify="right")
    for num_seeds in (4, 64):
        records = [encode(health_event(n, num_seeds, rng)) for n in range(BATCH)]
        plain = 0.0
        for name, codec in CODECS.items():
            size, write_us, read_us = measured(records, codec)
            plain = plain or size
            table.add_row(
                str(num_seeds), name, f"{size:,.0f}", f"{100 * size / plain:.0f} %", f"{write_us:.1f}", f"{read_us:.1f}"
            )
    Console(width=110).print(table)


def measured(records: list, codec: int) -> tuple[float, float, float]:  # type: ignore[type-arg]
    """Bytes, and microseconds to write and to read, per event; medians."""
    writes, reads, size = [], [], 0
    for _n in range(REPEATS):
        builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 2**24)
        for place, r in enumerate(records):
            builder.append(place, r.timestamp_ms, r.key, r.value, list(r.headers))
        began = time.perf_counter()
        data = bytes(builder.build())
        writes.append(time.perf_counter() - began)
        size = len(data)
        began = time.perf_counter()
        batches = MemoryRecords(data)
        count = sum(1 for _r in batches.next_batch())
        reads.append(time.perf_counter() - began)
        assert count == len(records)
    middle = REPEATS // 2
    return size / BATCH, 1e6 * sorted(writes)[middle] / BATCH, 1e6 * sorted(reads)[middle] / BATCH


if __name__ == "__main__":
    main()
