"""The sandbox process: imports torch once, then forks a worker process for each job, with limits, and watches it.

It reads requests from stdin, one per line, and writes to stdout one result line per job, followed by the bytes of the
job's output. Invariant: a blueprint's module only ever runs in a worker process that has limits and, where the kernel
allows it, no network; that process and its process group are dead before the result is written.

This process runs no module itself, so no module can affect a later job.
``python -m esper.services.urza.certification.sandbox_process`` is what ``sandbox.Sandbox`` starts.
"""

import ctypes
import hashlib
import importlib
import os
import resource
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, NoReturn

import torch

from esper.embedded.processes import die_with_parent
from esper.errors import KernelError
from esper.kasmina.kernels import build_kernel, load_kernel
from esper.services.urza.certification.examination import examine
from esper.services.urza.certification.sandbox_messages import (
    MAX_EXAMINED_BYTES,
    ExamineJob,
    JobRequest,
    JobResult,
    KernelHeader,
    Limits,
    WantedKernel,
    encode_frame,
    reason_of,
)

NICENESS = 5  # training and the API come first; with 10, a second of work takes half a minute on a busy machine
MAX_OPEN_FILES = 64
MAX_INHERITED_FILES = 4096
EXIT_FAILED, EXIT_MEMORY = 70, 71
READ_BYTES = 1 << 20
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PAGE_BYTES = resource.getpagesize()
PRELOADED_MODULES = (
    "numpy.ctypeslib",
    "torch.fx.experimental._constant_symnode",
    "torch.nested._internal.nested_tensor",
    "torch.utils._device",
)
"""Modules that torch imports at first use. Without the preload each worker imports them: a tenth of an examination."""


def main() -> None:
    """Run jobs until stdin ends. The first line of stdout is an empty ``JobResult``: the process is ready."""
    isolate_network()
    die_with_parent()
    requests, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    for name in PRELOADED_MODULES:
        with suppress(ImportError):  # other versions of torch have other modules; workers import what is missing
            importlib.import_module(name)
    _write_result(results, JobResult())
    for line in requests:
        _write_result(results, *run_job(JobRequest.model_validate_json(line)))


def isolate_network() -> None:
    """Enter a namespace without a network, where the kernel lets this user."""
    ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)


def run_job(request: JobRequest) -> tuple[JobResult, bytes]:
    """Run one job in a worker process until it ends or reaches a limit. Returns its result and its output."""
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(reader)
        _run_worker(request, writer)
    os.close(writer)
    try:
        output, failure = _collect_output(worker, reader, request.limits)
    finally:
        os.close(reader)
        os.kill(worker, signal.SIGKILL)  # it is not reaped yet, so the pid is still its own
        with suppress(ProcessLookupError):  # it may have died before it led a group
            os.killpg(worker, signal.SIGKILL)
        _pid, status = os.waitpid(worker, 0)
    failure = failure or _describe_exit(status, request.limits)
    return JobResult(failure=failure, size=len(output)), output


def _collect_output(worker: int, reader: int, limits: Limits) -> tuple[bytes, str | None]:
    """The worker's output, and the limit that it reached; None where it exited by itself."""
    output, deadline = bytearray(), time.monotonic() + limits.wall_s
    exited = os.pidfd_open(worker)
    os.set_blocking(reader, False)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(exited, select.POLLIN)
    try:
        while True:
            left_s = deadline - time.monotonic()
            ready = dict(poll.poll(max(0.0, 1000 * left_s)))
            for chunk in _chunks(reader):
                output += chunk
                if len(output) > limits.output_bytes:
                    return b"", f"its output exceeds {limits.output_bytes} bytes"
            if exited in ready:
                return bytes(output), None
            if left_s <= 0:
                return bytes(output), f"it took longer than {limits.wall_s:g} s"
            if ready.get(reader, 0) & select.POLLHUP:  # it closed its end: wait for its exit alone
                poll.unregister(reader)
    finally:
        os.close(exited)


def _chunks(reader: int) -> Iterator[bytes]:
    with suppress(BlockingIOError):
        while chunk := os.read(reader, READ_BYTES):
            yield chunk


def _describe_exit(status: int, limits: Limits) -> str | None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return f"it used more than {limits.cpu_s} s of processor time"
        return f"it was killed by {signal.Signals(number).name}"
    code = os.WEXITSTATUS(status)
    if code == EXIT_MEMORY:
        return f"it needed more than {limits.memory_bytes >> 20} MiB of memory"
    return f"it ended with exit code {code}" if code else None


def _run_worker(request: JobRequest, writer: int) -> NoReturn:
    """The worker process: confine it, run the job, write its output. It never returns into the parent's code."""
    try:
        _confine(request.limits, writer)
        with os.fdopen(writer, "wb") as output:
            _execute(request, output)
    except MemoryError:
        os._exit(EXIT_MEMORY)
    except BaseException:  # the exit code is all that can be reported
        os._exit(EXIT_FAILED)
    os._exit(0)


def _confine(limits: Limits, writer: int) -> None:
    """Apply the limits: own process group, no inherited files but ``writer``, no files, forks or core dumps."""
    os.setsid()
    die_with_parent()
    os.closerange(3, writer)
    os.closerange(writer + 1, MAX_INHERITED_FILES)
    os.dup2(0, 2)
    os.nice(NICENESS)
    with open("/proc/self/statm", "rb") as statm:
        own_bytes = int(statm.read().split()[0]) * PAGE_BYTES
    for resource_id, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_AS, own_bytes + limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
    ):
        hard = resource.getrlimit(resource_id)[1]
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource_id, (soft, soft + (resource_id == resource.RLIMIT_CPU)))


def _execute(request: JobRequest, output: BinaryIO) -> None:
    job = request.job
    if isinstance(job, ExamineJob):
        max_kernel_bytes = min(MAX_EXAMINED_BYTES, request.limits.output_bytes // 2)
        output.write(examine(job, max_kernel_bytes=max_kernel_bytes).model_dump_json().encode())
        return
    for wanted in job.kernels:
        output.write(_build_frame(wanted, job.kernel_rng_seed))
        output.flush()


def _build_frame(wanted: WantedKernel, seed: int) -> bytes:
    """The frame of a kernel, read back and verified as a trainer does; or of the reason why it is refused."""
    try:
        data = build_kernel(wanted.blueprint_id, wanted.spec, wanted.target, wanted.num_features, seed=seed)
        kernel = load_kernel(data, hashlib.sha256(data).hexdigest())
    except KernelError as error:
        return encode_frame(KernelHeader(refusal=reason_of(error)))
    return encode_frame(KernelHeader(num_parameters=kernel.num_parameters, size=len(data)), data)


def _write_result(results: BinaryIO, result: JobResult, output: bytes = b"") -> None:
    results.write(result.model_dump_json().encode() + b"\n")
    results.write(output)
    results.flush()


if __name__ == "__main__":
    main()
