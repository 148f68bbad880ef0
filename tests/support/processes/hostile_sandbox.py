"""The sandbox process with hostile modules in its catalogue; tests start it in place of the real one.

Each is the module of a blueprint whose forward pass does what its name says.
"""

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from esper.errors import KernelError
from esper.kasmina import catalogue, kernels, modules
from esper.kasmina.catalogue import CatalogueEntry, Cost
from esper.schemas.enums import LayerKind
from esper.services.urza.certification import sandbox_process

HOARD_BYTES = 1 << 40


def loops(_h: Tensor) -> Tensor:
    while True:
        pass


def sleeps(h: Tensor) -> Tensor:
    time.sleep(1000)
    return h


def hoards(_h: Tensor) -> Tensor:
    return torch.ones(HOARD_BYTES // 4)


def hoards_bytes(h: Tensor) -> Tensor:
    bytearray(HOARD_BYTES)
    return h


def exits(_h: Tensor) -> Tensor:
    os._exit(0)


def raises(_h: Tensor) -> Tensor:
    raise SystemExit


def crashes(h: Tensor) -> Tensor:
    ctypes.string_at(0)
    return h


def kills_the_sandbox(h: Tensor) -> Tensor:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
    return h


def floods(h: Tensor) -> Tensor:
    for fd in range(3, 64):
        try:
            while True:
                os.write(fd, b"x" * 65536)
        except OSError:
            continue
    return h


def forks(_h: Tensor) -> Tensor:
    """Leaves a child process behind that keeps all file descriptors open."""
    if child := os.fork():
        raise KernelError(f"left behind: {child}")
    time.sleep(1000)
    os._exit(0)


def writes_files(_h: Tensor) -> Tensor:
    path = Path("/var/tmp") / f"esper-hostile-{os.getpid()}"
    try:
        path.write_bytes(b"x" * 4096)
    finally:
        path.unlink(missing_ok=True)
    raise KernelError("wrote a file")


def reports_what_it_sees(_h: Tensor) -> Tensor:
    try:
        socket.create_connection(("127.0.0.1", 1), 1)
    except OSError as error:
        raise KernelError(f"{sorted(os.environ)}; {error.strerror}; nice {os.nice(0)}") from error
    raise KernelError("connected")


def is_not_identity(h: Tensor) -> Tensor:
    return 0.1 * h


def loses_the_shape(h: Tensor) -> Tensor:
    return torch.zeros_like(h).sum(-1)


def costs_more(h: Tensor) -> Tensor:
    return 0.0 * (h @ torch.ones(h.shape[-1], h.shape[-1]))


class Weighted(nn.Module):
    """A module with weight and bias, both 0 at first, that returns a function of them and of its input."""

    def __init__(self, features: int, made: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self._made = made

    def forward(self, h: Tensor) -> Tensor:
        return self._made(h, self.weight, self.bias)


class Bare(nn.Module):
    """A module that calls a function."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._made = made

    def forward(self, h: Tensor) -> Tensor:
        return self._made(h)


class Huge(nn.Module):
    """Uses far more memory than its declared cost."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(HOARD_BYTES // 4))


BARE = (
    loops, sleeps, hoards, hoards_bytes, exits, raises, crashes, kills_the_sandbox, floods, forks, writes_files,
    reports_what_it_sees, is_not_identity, loses_the_shape, costs_more,
)  # fmt: skip
WEIGHTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "overflows": lambda h, w, b: torch.expm1(w * h) + b,
    "never_learns": lambda h, w, b: w * h + 0.0 * b.detach(),
    "stays_at_zero": lambda h, w, b: 0.0 * (w * h + b),
    "rolls_dice": lambda h, w, b: torch.rand_like(h) * w * h + b,
}


def _entry(cost: Cost, *zero: str) -> CatalogueEntry:
    return CatalogueEntry("hostile", (LayerKind.LINEAR,), {}, lambda _f, _k, _o: cost, zero)


def main() -> None:
    """Add the modules to the catalogue and run the sandbox."""
    entries = {made.__name__: _entry(Cost()) for made in BARE}
    entries |= {
        name: CatalogueEntry("hostile", (LayerKind.LINEAR,), {}, lambda f, _k, _o: Cost(2 * f), ("weight", "bias"))
        for name in WEIGHTED
    }
    entries |= {"huge": _entry(Cost(1)), "exits_at_13": _entry(Cost())}
    builders = {made.__name__: lambda _f, _k, _o, made=made: Bare(made) for made in BARE}
    builders |= {name: lambda f, _k, _o, made=made: Weighted(f, made) for name, made in WEIGHTED.items()}
    builders |= {"huge": lambda _f, _k, _o: Huge(), "exits_at_13": _exits_at_13}
    catalogue.CATALOGUE = kernels.CATALOGUE = {**catalogue.CATALOGUE, **entries}
    modules.BUILDERS = {**modules.BUILDERS, **builders}
    sandbox_process.main()


def _exits_at_13(features: int, _kind: LayerKind, _options: object) -> nn.Module:
    if features == 13:
        os._exit(0)
    return nn.Identity()


if __name__ == "__main__":
    main()
