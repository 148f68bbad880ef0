"""The sandbox as Urza sees it: jobs go in, answers come out, whatever a job does.

Owns the process (``sandbox_process``), which is started once, warm, and replaced when it dies. It gets
no ESPER_ variable, hence no credential; what its jobs may use is in their limits. One job at a time.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from esper.errors import ContractError, UnavailableError
from esper.logging import get_logger
from esper.services.urza.certification.sandbox_jobs import (
    Build,
    BuiltKernel,
    Ending,
    Examination,
    Examine,
    Limits,
    Order,
    frames,
    reason_of,
)

COMMAND = (sys.executable, "-P", "-m", "esper.services.urza.certification.sandbox_process")
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # its threads would not be there after a fork
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
START_TIMEOUT_S = 120.0  # torch takes long to import on a busy machine
ANSWER_GRACE_S = 30.0  # beyond a job's wall clock: then the process itself hangs
ATTEMPTS = 2  # a machine that is busy or short of memory may have been the reason

_log = get_logger(__name__)


class Sandbox:
    """Async context manager. Its process is started at once; who needs it first waits until it is warm.

    Args:
        command: what to run as the process; tests put modules into it that no catalogue has.
    """

    def __init__(self, limits: Limits, command: Sequence[str] = COMMAND) -> None:
        self._limits = limits
        self._command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None
        self._is_warm = False
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._end()

    @property
    def pid(self) -> int | None:
        """The number of its process, while it has one."""
        return self._process.pid if self._process is not None else None

    async def examine(self, job: Examine, limits: Limits | None = None) -> Examination:
        """What became of a blueprint. One that broke its sandbox was not built.

        Args:
            limits: others than the sandbox's own.

        Raises:
            UnavailableError: the sandbox cannot be started.
        """
        ending, answer = await self._attempt(job, limits or self._limits)
        if ending.failure is None:
            try:
                return Examination.model_validate_json(answer)
            except ValidationError:
                ending = Ending(failure="it answered something else than an examination")
        return Examination(not_built=f"contained in the sandbox: {ending.failure}")

    async def build(self, job: Build) -> tuple[list[BuiltKernel], str | None]:
        """The kernels that were built, in order, and why the next one was not; None where all were.

        Raises:
            UnavailableError: the sandbox cannot be started.
        """
        ending, answer = await self._attempt(job, self._limits)
        try:
            built = list(frames(answer))
        except (ContractError, ValidationError):
            return [], "contained in the sandbox: it answered something else than kernels"
        if len(built) >= len(job.kernels):
            return built[: len(job.kernels)], None
        return built, f"contained in the sandbox: {ending.failure or 'it ended without an answer'}"

    async def _attempt(self, job: Examine | Build, limits: Limits) -> tuple[Ending, bytes]:
        """Run a job; once more where it was contained."""
        ending = Ending()
        for attempt in range(1, ATTEMPTS + 1):
            async with self._lock:
                ending, answer = await self._run(Order(limits=limits, job=job))
            if ending.failure is None:
                return ending, answer
            _log.warning("sandbox.job_failed", failure=ending.failure, attempt=attempt, attempts=ATTEMPTS)
        return ending, answer

    async def _run(self, order: Order) -> tuple[Ending, bytes]:
        await self._warm_up()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            async with asyncio.timeout(order.limits.wall_s + ANSWER_GRACE_S):
                process.stdin.write(order.model_dump_json().encode() + b"\n")
                await process.stdin.drain()
                return await self._read_answer(process, order.limits)
        except (EOFError, OSError, ValueError) as error:  # a TimeoutError is an OSError; ValueError: no Ending came
            await self._end()
            return Ending(failure=reason_of(f"it took the sandbox with it ({type(error).__name__})")), b""
        except asyncio.CancelledError:
            await self._end()  # the answer to come would be taken for the next job's
            raise

    async def _read_answer(self, process: asyncio.subprocess.Process, limits: Limits) -> tuple[Ending, bytes]:
        assert process.stdout is not None
        line = await process.stdout.readuntil(b"\n")
        ending = Ending.model_validate_json(line)
        if ending.size > limits.answer_bytes:
            raise ValueError(f"an answer of {ending.size} bytes")
        return ending, await process.stdout.readexactly(ending.size)

    async def _start(self) -> None:
        self._is_warm = False
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )

    async def _warm_up(self) -> None:
        if self._process is None or self._process.returncode is not None:
            await self._start()
        if self._is_warm:
            return
        assert self._process is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._read_answer(self._process, self._limits)
        except (EOFError, OSError, ValueError) as error:
            await self._end()
            raise UnavailableError(f"the sandbox of blueprints did not start ({type(error).__name__})") from error
        self._is_warm = True

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children die with it
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _environment() -> dict[str, str]:
    """No more than Python and torch need, and the packages that this process sees."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {**kept, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
