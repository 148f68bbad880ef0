"""Child processes that never outlive their parent, however it ends.

The kernel's promise (PR_SET_PDEATHSIG) is bound to the *thread* that starts the child: start
children from a thread that lives as long as they should, the main thread as a rule.
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
    """Ask for ``sig`` when the parent of this process ends. Call it first thing in a program."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(launcher.PR_SET_PDEATHSIG, int(sig))
    if os.getppid() != parent:
        os.kill(os.getpid(), sig)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(port: int) -> bool:
    """Whether somebody accepts connections on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class ChildProcess:
    """One program, its log file and its end.

    Args:
        name: for messages.
        command: program and arguments.
        env: all its variables.
        log_path: gets stdout and stderr, appended.
        user: whom to run it as (root only).
        death_signal: what it gets when its parent ends.
        stop_signal: what ``stop`` sends first.
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
        """Its process id, while it runs."""
        return self._process.pid if self._process is not None and self.is_alive else None

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs or where it never ran."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Start it, in a session of its own: Ctrl-C reaches the parent, which then stops it."""
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
        """Wait for a condition while the program lives.

        Raises:
            UnavailableError: it ended, or was not ready in time; with the end of its log.
        """
        deadline = time.monotonic() + deadline_s
        while not is_ready():
            if not self.is_alive:
                raise UnavailableError(f"{self.name} ended with {self.returncode} while starting:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self.name} was not ready after {deadline_s:.0f} s:\n{self.tail()}")
            time.sleep(POLL_S)

    def tail(self, num_lines: int = LOG_TAIL_LINES) -> str:
        """The end of its log, and where to find the rest."""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join((*(f"  {line}" for line in lines[-num_lines:]), f"  (log: {self.log_path})"))

    def send(self, sig: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self._process is not None and self.is_alive:
            self._process.send_signal(sig)

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End it, by force after ``grace_s``. Fine when it does not run."""
        self.send(self._stop_signal)
        try:
            self.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.send(signal.SIGKILL)
        self.wait(None)

    def wait(self, timeout_s: float | None) -> int | None:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout_s``.
        """
        return self._process.wait(timeout_s) if self._process is not None else None
