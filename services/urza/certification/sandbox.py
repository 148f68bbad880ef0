"""The sandbox as Urza sees it: jobs go in, results come out, whatever a blueprint's module does.

Owns the process (``sandbox_process``), which starts once, stays warm, and is replaced when it dies. It gets no ESPER_
variable, hence no credential; limits bound its jobs. One job runs at a time.
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
from esper.services.urza.certification.sandbox_messages import (
    BuildJob,
    BuiltKernel,
    Examination,
    ExamineJob,
    JobRequest,
    JobResult,
    Limits,
    decode_frames,
    reason_of,
)

COMMAND = (sys.executable, "-P", "-m", "esper.services.urza.certification.sandbox_process")
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # threads do not survive the fork of a worker process
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
START_TIMEOUT_S = 120.0  # importing torch takes long on a busy machine
RESULT_GRACE_S = 30.0  # beyond a job's wall clock; after it the process itself hangs
MAX_ATTEMPTS = 2  # a busy machine, or one short of memory, can be the cause of a failure
CONTAINED = "contained in the sandbox"

_log = get_logger(__name__)


class Sandbox:
    """Async context manager. Its process starts at once; the first job waits until it is warm.

    Args:
        command: runs the process; tests add modules to its catalogue.
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
        await self._kill()

    @property
    def pid(self) -> int | None:
        """The id of its process, while it has one."""
        return self._process.pid if self._process is not None else None

    async def examine(self, job: ExamineJob, limits: Limits | None = None) -> Examination:
        """Examine a blueprint. One that breaks its worker process has a ``build_error``.

        Args:
            limits: override the sandbox's own.

        Raises:
            UnavailableError: the sandbox cannot be started.
        """
        result, output = await self._run_with_retry(job, limits or self._limits)
        failure = result.failure
        if failure is None:
            try:
                return Examination.model_validate_json(output)
            except ValidationError:
                failure = "its output is not an examination"
        return Examination(build_error=f"{CONTAINED}: {failure}")

    async def build(self, job: BuildJob) -> tuple[list[BuiltKernel], str | None]:
        """The kernels that were built, in order, and why the next one was not; None where all were.

        Raises:
            UnavailableError: the sandbox cannot be started.
        """
        result, output = await self._run_with_retry(job, self._limits)
        try:
            built = list(decode_frames(output))
        except (ContractError, ValidationError):
            return [], f"{CONTAINED}: its output is not kernels"
        if len(built) >= len(job.kernels):
            return built[: len(job.kernels)], None
        return built, f"{CONTAINED}: {result.failure or 'it ended without a result'}"

    async def _run_with_retry(self, job: ExamineJob | BuildJob, limits: Limits) -> tuple[JobResult, bytes]:
        result, output = JobResult(), b""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            async with self._lock:
                result, output = await self._run(JobRequest(limits=limits, job=job))
            if result.failure is None:
                break
            _log.warning("sandbox.job_failed", failure=result.failure, attempt=attempt, attempts=MAX_ATTEMPTS)
        return result, output

    async def _run(self, request: JobRequest) -> tuple[JobResult, bytes]:
        await self._wait_until_warm()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            async with asyncio.timeout(request.limits.wall_s + RESULT_GRACE_S):
                process.stdin.write(request.model_dump_json().encode() + b"\n")
                await process.stdin.drain()
                return await self._read_result(process, request.limits)
        except (EOFError, OSError, ValueError) as error:  # TimeoutError is an OSError; ValueError: no JobResult came
            await self._kill()
            return JobResult(failure=reason_of(f"it broke the sandbox process ({type(error).__name__})")), b""
        except asyncio.CancelledError:
            await self._kill()  # the next job would read this one's result
            raise

    async def _read_result(self, process: asyncio.subprocess.Process, limits: Limits) -> tuple[JobResult, bytes]:
        assert process.stdout is not None
        line = await process.stdout.readuntil(b"\n")
        result = JobResult.model_validate_json(line)
        if result.size > limits.output_bytes:
            raise ValueError(f"an output of {result.size} bytes")
        return result, await process.stdout.readexactly(result.size)

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

    async def _wait_until_warm(self) -> None:
        if self._process is None or self._process.returncode is not None:
            await self._start()
        if self._is_warm:
            return
        assert self._process is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._read_result(self._process, self._limits)
        except (EOFError, OSError, ValueError) as error:
            await self._kill()
            raise UnavailableError(
                f"sandbox: its process did not start ({type(error).__name__}); its stderr has the cause"
            ) from error
        self._is_warm = True

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its children
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _environment() -> dict[str, str]:
    """What Python and torch need, and the packages that this process sees; nothing else."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {**kept, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
