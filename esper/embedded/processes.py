"""Child processes that never outlive their parent, even if it is killed.

The kernel sends the signal of PR_SET_PDEATHSIG when the *thread* that started the child ends, so
start children from a thread that lives as long as they should, usually the main thread.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from esper.embedded import launcher
from esper.errors import UnavailableError

POLL_S = 0.05
STOP_GRACE_S = 10.0  # then SIGKILL
LOG_TAIL_LINES = 15


def die_with_parent(sig: signal.Signals = signal.SIGKILL) -> None:
    """Receive ``sig`` when the parent of this process ends. Call it first in a program."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(launcher.PR_SET_PDEATHSIG, int(sig))
    if os.getppid() != parent:
        os.kill(os.getpid(), sig)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free at the time of the call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Whether a server accepts connections on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class ChildProcess:
    """A program that runs as a child process, with a log file.

    Args:
        name: name of the program in messages.
        command: program and arguments.
        env: its complete environment.
        log_path: file to which stdout and stderr are appended.
        user: user to run it as (root only).
        death_signal: signal that it receives when its parent ends.
        stop_signal: signal that ``stop`` sends first.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path,
        cwd: Path | None = None,
        user: str | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command = list(command)
        self._env = dict(env)
        self._cwd = cwd
        self._user = user
        self._death_signal = death_signal
        self._stop_signal = stop_signal
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs, else None."""
        return self._process.pid if self._process is not None and self.is_alive else None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs and before its first start."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Start it in a new session, so that Ctrl-C reaches only the parent, which stops it."""
        head = [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), self._user or "-"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*head, str(int(self._death_signal)), *self._command],
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, is_ready: Callable[[], bool], deadline_s: float) -> None:
        """Wait for a condition while the program runs.

        Raises:
            UnavailableError: it ended, or was not ready in time; the message has the end of its log.
        """
        deadline = time.monotonic() + deadline_s
        while not is_ready():
            if not self.is_alive:
                raise UnavailableError(f"{self.name} exited with {self.returncode} while starting:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self.name} was not ready after {deadline_s:.0f} s:\n{self.tail()}")
            time.sleep(POLL_S)

    def tail(self, num_lines: int = LOG_TAIL_LINES) -> str:
        """The end of its log, with the path of the file."""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join((*(f"  {line}" for line in lines[-num_lines:]), f"  (log: {self.log_path})"))

    def send(self, sig: signal.Signals) -> None:
        """Send a signal if it runs."""
        if self._process is not None and self.is_alive:
            self._process.send_signal(sig)

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stop it, with SIGKILL after ``grace_s`` seconds; does nothing if it does not run."""
        self.send(self._stop_signal)
        try:
            self.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self.send(signal.SIGKILL)
        self.wait(None)

    def wait(self, timeout_s: float | None) -> int | None:
        """Wait for the end of the process; returns its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout_s``.
        """
        return self._process.wait(timeout_s) if self._process is not None else None
