"""Processes on a small disk that can be filled: a tmpfs in new namespaces."""

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
    """``outbox_on_full_disk.py`` on a disk of ``SIZE_MB``, not started yet. Skips the test if it cannot be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    command = with_disk(disk, SIZE_MB, sys.executable, str(SCRIPT), what, str(disk), *arguments)
    return process(stack, folder, what, *command, PYTHONPATH=IMPORTS)


def with_disk(disk: Path, size_mb: int, *command: str) -> tuple[str, ...]:
    """A command that mounts a small disk at ``disk`` and runs there as the same user. Skips if it cannot be mounted."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        pytest.skip("no unshare or mount on this machine: a small disk cannot be mounted")
    mount = f'mount -t tmpfs -o size={size_mb}m tmpfs "$1" && shift && exec "$@"'
    mounting = ("sh", "-c", mount, "sh", str(disk))
    if os.geteuid() == 0:  # in a user namespace it could not switch to another user
        namespace, back = ("unshare", "-m"), ()
    else:
        namespace = ("unshare", "-Urm")
        back = ("unshare", "-U", f"--map-user={os.getuid()}", f"--map-group={os.getgid()}")
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("namespaces are not allowed: a small disk cannot be mounted")
    return (*namespace, *mounting, *back, *command)


def end_of(child: ChildProcess) -> str:
    """Wait for the end of the script. Returns its output."""
    wait_until(lambda: not child.is_alive, 90, "the end of the script")
    printed = child.log_path.read_text()
    assert child.returncode == 0, printed
    assert "whole" in printed.split()
    return printed
