"""Cost of a log call on the calling thread, and lines written per second.

Interleaved rounds of one run: Esper to a file, Esper to a null handler, and structlog that renders JSON and writes it
on the calling thread. Calls come in bursts that fit the queue.
"""

import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from esper.config import LoggingSettings, S3Settings
from esper.logging import get_logger, logger_factory
from esper.logging.log_entry import LineRenderer
from esper.logging.writer_thread import LogWriter

ROUNDS, CALLS = 15, 200
WORK_S = 300e-6
FIELDS = {"run": "digits-demo", "layer": "fc1", "step": 1234, "loss": 0.25, "is_ready": True}
NESTED = {"boundary": 7, "seeds": [{"seed": n, "stage": "TRAINING", "alpha": 0.5} for n in range(4)]}


def scalars(log: Any) -> None:
    log.info("bench.scalars", **FIELDS)


def nested(log: Any) -> None:
    log.info("bench.nested", **NESTED)


def exception(log: Any) -> None:
    try:
        raise ValueError("no room")
    except ValueError:
        log.exception("bench.exception", **FIELDS)


def off(log: Any) -> None:
    log.debug("bench.off", **FIELDS)


def esper_with(sink: Callable[[bytes], object]) -> tuple[Any, Callable[[], object]]:
    writer = LogWriter(LineRenderer(LoggingSettings(level="INFO", format="json"), has_colors=False), sink)

    def start() -> None:
        logger_factory.writer = writer

    return start, writer.flush


def stock(path: Path) -> Any:
    return structlog.wrap_logger(
        structlog.WriteLoggerFactory(path.open("w"))(),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )


def burst_us(call: Callable[[Any], None], log: Any, _flush: Callable[[], object]) -> float:
    """Microseconds per call on this thread, back to back: the writer thread competes for the interpreter."""
    gc.collect()
    began = time.perf_counter()
    for _n in range(CALLS):
        call(log)
    return 1e6 * (time.perf_counter() - began) / CALLS


def paced_us(call: Callable[[Any], None], log: Any, _flush: Callable[[], object]) -> float:
    """Median microseconds of a call on this thread, between other work, as in a training loop."""
    taken = []
    for _n in range(CALLS // 4):
        until = time.perf_counter() + WORK_S
        while time.perf_counter() < until:
            pass
        began = time.perf_counter()
        call(log)
        taken.append(time.perf_counter() - began)
    return 1e6 * statistics.median(taken)


def lines_per_s(call: Callable[[Any], None], log: Any, flush: Callable[[], object]) -> float:
    """Lines per second from the first call to the last byte, in bursts that lose no line."""
    began = time.perf_counter()
    for _burst in range(10):
        for _n in range(1_000):
            call(log)
        flush()
    return 10_000 / (time.perf_counter() - began)


def main() -> None:
    logging.getLogger().setLevel(logging.INFO)
    S3Settings.model_validate({"access_key": "an-access-key", "secret_key": "a/secret+key"})  # values to mask
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "esper.log").open("wb", buffering=0) as file:
        log = get_logger("bench")
        variants = {
            "esper, to a file": (*esper_with(file.write), log),
            "esper, to nothing": (*esper_with(len), log),
            "structlog, to a file": (lambda: None, lambda: None, stock(Path(folder) / "stock.log")),
        }
        for way in (paced_us, burst_us):
            print(f"{'us a call, ' + way.__name__:30}" + "".join(f"{name:>22}" for name in variants))
            for call in (scalars, nested, exception, off):
                taken: dict[str, list[float]] = {name: [] for name in variants}
                for _round in range(ROUNDS):
                    for name, (start, flush, logger) in variants.items():
                        start()
                        taken[name].append(way(call, logger, flush))
                        flush()
                print(f"{call.__name__:30}" + "".join(f"{statistics.median(t):22.1f}" for t in taken.values()))
            print()
        print(f"{'lines/s, to the last byte':30}")
        for call in (scalars, nested):
            rates = []
            for start, flush, logger in variants.values():
                start()
                rates.append(lines_per_s(call, logger, flush))
            print(f"{call.__name__:30}" + "".join(f"{rate:22,.0f}" for rate in rates))


if __name__ == "__main__":
    main()
