"""A process on a small disk that can really be full: a tmpfs in namespaces of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.conditions import wait_until
from support.paths import IMPORTS, PROCESSES
from support.processes.esper_processes import process

from esper.embedded.processes import ChildProcess
from esper.embedded.stack import EmbeddedStack

SCRIPT = PROCESSES / "outbox_on_full_disk.py"
SIZE_MB = 24


def on_small_disk(stack: EmbeddedStack, folder: Path, what: str, *arguments: str) -> ChildProcess:
    """``outbox_on_full_disk.py`` on a disk of ``SIZE_MB``; not started yet. Skips where no disk can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    command = with_disk(disk, SIZE_MB, sys.executable, str(SCRIPT), what, str(disk), *arguments)
    return process(stack, folder, what, *command, PYTHONPATH=IMPORTS)


def with_disk(disk: Path, size_mb: int, *command: str) -> tuple[str, ...]:
    """A command, run where ``disk`` is a small one, by the same user. Skips where no disk can be mounted."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        pytest.skip("no unshare and mount here, so no small disk can be mounted")
    mount = f'mount -t tmpfs -o size={size_mb}m tmpfs "$1" && shift && exec "$@"'
    mounting = ("sh", "-c", mount, "sh", str(disk))
    if os.geteuid() == 0:  # in a namespace of users it could not become another one
        namespace, back = ("unshare", "-m"), ()
    else:
        namespace = ("unshare", "-Urm")
        back = ("unshare", "-U", f"--map-user={os.getuid()}", f"--map-group={os.getgid()}")
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here, so no small disk can be mounted")
    return (*namespace, *mounting, *back, *command)


def end_of(child: ChildProcess) -> str:
    """Wait until it is through with everything; what it printed."""
    wait_until(lambda: not child.is_alive, 90, "the end of the script")
    printed = child.log_path.read_text()
    assert child.returncode == 0, printed
    assert "whole" in printed.split()
    return printed
