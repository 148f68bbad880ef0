"""Logging of whole processes: crashes, forks, exits, and a stderr that cannot be written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 60
SET_UP = """
import logging, os, sys, threading, warnings
from esper.config import LoggingSettings, PostgresSettings
from esper.logging import configure_logging, get_logger
postgres = PostgresSettings.model_validate({"dsn": "postgresql://u:hun%40ter22@h/d"})
configure_logging(LoggingSettings(level="INFO", format="json"))
log = get_logger("esper.test")
"""


def program(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program with logging configured."""
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.run(
        [sys.executable, "-c", SET_UP + code], text=True, check=False, timeout=TIMEOUT_S, stdout=subprocess.PIPE, **options
    )  # fmt: skip


def events(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.stderr.splitlines()]


CRASH = 'raise OSError("refused postgresql://u:hun%40ter22@h/d, password hun@ter22")'
CRASHES = {
    "process.crashed": CRASH,
    "thread.crashed": f"def fail():\n  {CRASH}\nt = threading.Thread(target=fail); t.start(); t.join()",
    "finalizer.crashed": f"class Held:\n  def __del__(self):\n    {CRASH}\nheld = Held(); del held",
    "background failed": f"""
import asyncio
async def fail():
    asyncio.get_running_loop().call_exception_handler({{"message": "background failed", "exception": made()}})
def made():
    try:
        {CRASH}
    except OSError as error:
        return error
asyncio.run(fail())
""",
    "failed": f"try:\n  {CRASH}\nexcept OSError:\n  logging.getLogger('faust').exception('failed')",
}


@pytest.mark.parametrize("event", sorted(CRASHES))
def test_crash_logs_masked_traceback(event: str) -> None:
    run = program(CRASHES[event])
    assert run.returncode == (1 if event == "process.crashed" else 0)
    [line] = events(run)
    assert line["event"] == event
    assert "Traceback" in line["exception"]
    assert "OSError: refused ***, password ***" in line["exception"]
    assert "ter22" not in run.stderr


def test_python_warning_is_logged() -> None:
    [line] = events(program('warnings.warn("old: postgresql://u:hun%40ter22@h/d")'))
    assert line["logger"] == "py.warnings"
    assert "ter22" not in line["event"]


def test_last_lines_before_exit_are_written() -> None:
    lines = events(program('for n in range(5_000): log.info("line", n=n)\nsys.exit(3)'))
    assert [e["n"] for e in lines] == list(range(5_000))


@pytest.mark.parametrize("method", ["fork", "os.fork"])
def test_forked_child_logs_only_its_own_lines(method: str) -> None:
    code = f"""
import multiprocessing
from esper.logging import flush_logging
busy = threading.Event()
def keep_logging():
    while not busy.wait(0.0002):
        log.info("parent")
def child(n):
    log.info("child", n=n)
thread = threading.Thread(target=keep_logging); thread.start()
if {method!r} == "fork":
    children = [multiprocessing.get_context("fork").Process(target=child, args=(n,)) for n in range(20)]
    for c in children: c.start()
    for c in children: c.join(20)
    assert [c.exitcode for c in children] == [0] * 20
else:
    for n in range(20):
        pid = os.fork()
        if pid == 0:
            child(n); flush_logging(); os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
busy.set(); thread.join()
flush_logging()  # a full queue takes no more lines
log.info("parent.ended")
"""
    run = program(code)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert sorted(e["n"] for e in lines if e["event"] == "child") == list(range(20))
    assert sum(e["event"] == "parent.ended" for e in lines) == 1


@pytest.mark.parametrize("stderr", ["closed", "no reader", "full disk"])
def test_unwritable_stderr_does_not_affect_the_program(stderr: str) -> None:
    code = """
for n in range(100):
    log.info("line", n=n)
    logging.getLogger("other").error("line")
from esper.logging import flush_logging, logger_factory
assert flush_logging(20)
assert logger_factory.writer.num_lost == 200, logger_factory.writer.num_lost
print("done")
"""
    if stderr == "closed":
        run = program("os.close(2)\n" + code)
    elif stderr == "no reader":
        reading, writing = os.pipe()
        os.close(reading)
        run = program(code, stderr=writing)
        os.close(writing)
    else:
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        with open("/dev/full", "w") as full:
            run = program(code, stderr=full)
    assert run.stdout == "done\n"
    assert run.returncode == 0


def test_stalled_stderr_reader_does_not_block_exit() -> None:
    reading, writing = os.pipe()
    try:
        began = time.monotonic()
        run = program('for n in range(5_000): log.info("line", text="x" * 200)\nprint("done")', stderr=writing)
        assert run.stdout == "done\n"
        assert run.returncode == 0
        assert time.monotonic() - began < TIMEOUT_S / 2
    finally:
        os.close(reading)
        os.close(writing)
