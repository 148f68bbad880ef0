"""`esper demo`: leaves no process behind, runs twice at a time, and fails if nothing grew."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.conditions import wait_until
from support.processes.esper_processes import alive

pytestmark = pytest.mark.slow

ESPER = str(Path(sys.executable).parent / "esper")
SHORT = {"ESPER_TRAINER__EPOCHS": "2", "ESPER_TRAINER__COPIES": "4", "COLUMNS": "120"}
EXIT_NOTHING_GREW = 3


def start(log: Path, **env: str) -> subprocess.Popen[bytes]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ESPER_")}
    with log.open("wb") as output:
        return subprocess.Popen([ESPER, "demo"], env={**clean, **SHORT, **env}, stdout=output, stderr=subprocess.STDOUT)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("moment", "sig"),
    [
        ("starting oona", signal.SIGKILL),
        ("starting tamiyo", signal.SIGINT),
        ("With Esper", signal.SIGKILL),
        ("With Esper", signal.SIGINT),
    ],
)
def test_demo_leaves_no_process_when_killed(tmp_path: Path, moment: str, sig: signal.Signals) -> None:
    log = tmp_path / "demo.log"
    demo = start(log, ESPER_TRAINER__EPOCHS="50")
    wait_until(lambda: moment in log.read_text() or demo.poll() is not None, 240, moment)
    assert demo.poll() is None, log.read_text()
    processes = psutil.Process(demo.pid).children(recursive=True)
    assert len(processes) > 5
    demo.send_signal(sig)
    demo.wait(60)
    wait_until(lambda: not alive(processes), 60, "the end of all its processes")


@pytest.mark.timeout(600)
def test_two_demos_run_together_and_report_no_growth(tmp_path: Path) -> None:
    demos = [start(tmp_path / f"{n}.log") for n in range(2)]
    for n, demo in enumerate(demos):
        assert demo.wait(500) == EXIT_NOTHING_GREW, (tmp_path / f"{n}.log").read_text()
        printed = (tmp_path / f"{n}.log").read_text()
        assert "Nothing grew" in printed
        assert "accuracy at the end" in printed
        assert "system.runs" in printed
