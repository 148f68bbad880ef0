"""The sandbox's own process: imports torch once, then forks a child for every job, with limits, and watches it.

It reads orders from stdin, a line each, and answers on stdout: a line that says how the job ended, then the bytes of
its answer. Invariant: what runs a blueprint's module is always a child that has limits and no way to the network
where the kernel allows it, and that child and its process group are gone before the answer is told.

The child ends with its answer or by a limit; the process that forks it runs no module itself, so that none can
spoil it for the next.
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
from esper.services.urza.certification.sandbox_jobs import (
    Build,
    Ending,
    Examine,
    KernelHeader,
    Limits,
    Order,
    WantedKernel,
    frame,
    reason_of,
)

NICENESS = 5  # training and the API come first; with 10, a second of work takes half a minute on a busy machine
MAX_OPEN_FILES = 64
MAX_INHERITED_FILES = 4096
EXIT_FAILED, EXIT_MEMORY = 70, 71
READ_BYTES = 1 << 20
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PAGE_BYTES = resource.getpagesize()
WARM = (
    "numpy.ctypeslib",
    "torch.fx.experimental._constant_symnode",
    "torch.nested._internal.nested_tensor",
    "torch.utils._device",
)
"""What torch imports at its first use: here once, else in every child, where it is a tenth of an examination."""


def main() -> None:
    """Answer orders until stdin ends. The first line out is an empty ``Ending``: ready."""
    leave_network()
    die_with_parent()
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    for name in WARM:
        with suppress(ImportError):  # another torch has others; children import what is missing
            importlib.import_module(name)
    _tell(answers, Ending())
    for line in orders:
        _tell(answers, *run(Order.model_validate_json(line)))


def leave_network() -> bool:
    """Go where no network is, if the kernel lets this user; whether it did."""
    return bool(ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0)


def run(order: Order) -> tuple[Ending, bytes]:
    """Run one job in a child of its own, to its end or its limits."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_the_child(order, writer)
    os.close(writer)
    try:
        answer, failure = _collect(child, reader, order.limits)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
        with suppress(ProcessLookupError):  # it may not have come to lead a group
            os.killpg(child, signal.SIGKILL)
        _pid, status = os.waitpid(child, 0)
    failure = failure or _ending_of(status, order.limits)
    return Ending(failure=failure, size=len(answer)), answer


def _collect(child: int, reader: int, limits: Limits) -> tuple[bytes, str | None]:
    """The child's answer, and why it was stopped; None where it ended by itself, however it did."""
    answer, deadline = bytearray(), time.monotonic() + limits.wall_s
    ended = os.pidfd_open(child)
    os.set_blocking(reader, False)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(ended, select.POLLIN)
    try:
        while True:
            left_s = deadline - time.monotonic()
            ready = dict(poll.poll(max(0.0, 1000 * left_s)))
            for chunk in _chunks(reader):
                answer += chunk
                if len(answer) > limits.answer_bytes:
                    return b"", f"it answered more than {limits.answer_bytes} bytes"
            if ended in ready:
                return bytes(answer), None
            if left_s <= 0:
                return bytes(answer), f"it took longer than {limits.wall_s:g} s"
            if ready.get(reader, 0) & select.POLLHUP:  # it closed its end: only its own end is waited for
                poll.unregister(reader)
    finally:
        os.close(ended)


def _chunks(reader: int) -> Iterator[bytes]:
    with suppress(BlockingIOError):
        while chunk := os.read(reader, READ_BYTES):
            yield chunk


def _ending_of(status: int, limits: Limits) -> str | None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return f"it used more than {limits.cpu_s} s of processor time"
        return f"it was ended by {signal.Signals(number).name}"
    code = os.WEXITSTATUS(status)
    if code == EXIT_MEMORY:
        return f"it needed more than {limits.memory_bytes >> 20} MB of memory"
    return f"it ended with exit code {code}" if code else None


def _be_the_child(order: Order, writer: int) -> NoReturn:
    """Take on the limits, do the job, write the answer. Whatever happens, nothing of the parent's goes on."""
    try:
        _confine(order.limits, writer)
        with os.fdopen(writer, "wb") as answer:
            _do(order.job, answer)
    except MemoryError:
        os._exit(EXIT_MEMORY)
    except BaseException:  # it has nowhere to tell it
        os._exit(EXIT_FAILED)
    os._exit(0)


def _confine(limits: Limits, writer: int) -> None:
    os.setsid()
    die_with_parent()
    os.closerange(3, writer)
    os.closerange(writer + 1, MAX_INHERITED_FILES)
    os.dup2(0, 2)
    os.nice(NICENESS)
    with open("/proc/self/statm", "rb") as statm:
        has_bytes = int(statm.read().split()[0]) * PAGE_BYTES
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_AS, has_bytes + limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most + (what == resource.RLIMIT_CPU)))


def _do(job: Examine | Build, answer: BinaryIO) -> None:
    if isinstance(job, Examine):
        answer.write(examine(job).model_dump_json().encode())
        return
    for wanted in job.kernels:
        answer.write(_kernel(wanted, job.kernel_seed))
        answer.flush()


def _kernel(wanted: WantedKernel, seed: int) -> bytes:
    """A kernel, read back and verified as a trainer will, in a frame; or why it is refused."""
    try:
        data = build_kernel(wanted.blueprint_id, wanted.spec, wanted.target, wanted.num_features, seed=seed)
        kernel = load_kernel(data, hashlib.sha256(data).hexdigest())
    except KernelError as error:
        return frame(KernelHeader(refusal=reason_of(error)))
    return frame(KernelHeader(num_parameters=kernel.num_parameters, size=len(data)), data)


def _tell(answers: BinaryIO, ending: Ending, answer: bytes = b"") -> None:
    answers.write(ending.model_dump_json().encode() + b"\n")
    answers.write(answer)
    answers.flush()


if __name__ == "__main__":
    main()
