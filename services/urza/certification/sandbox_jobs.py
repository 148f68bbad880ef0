"""What Urza asks of its sandbox, and what the sandbox answers: data alone, read by pydantic, never unpickled.

No torch: both sides import it. What comes out of the sandbox is checked as what a stranger wrote.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from esper.errors import ContractError
from esper.schemas.assets import BlueprintSpec, Measurement
from esper.schemas.base import BlueprintId, Count, FrozenContract, NumFeatures, Remark, ShortName
from esper.schemas.enums import LayerKind

MAX_REASON_CHARS = 500
HEADER_BYTES = 4  # how a frame says how long its header is
MAX_HEADER_BYTES = 64 * 1024


class Limits(FrozenContract):
    """What one job may use before it is ended."""

    wall_s: float
    cpu_s: int
    memory_bytes: Annotated[int, Field(description="Beyond what the sandbox has when it starts.")]
    answer_bytes: int


class ExamineJob(FrozenContract):
    """Build a blueprint's module in layers of these widths, and find out whether it does what it must."""

    blueprint_id: BlueprintId
    spec: BlueprintSpec
    widths: tuple[NumFeatures, ...]
    kernel_rng_seed: int


class WantedKernel(FrozenContract):
    """One kernel that a run could want."""

    blueprint_id: BlueprintId
    blueprint_version: int
    spec: BlueprintSpec
    target: LayerKind
    num_features: NumFeatures


class BuildJob(FrozenContract):
    """Build these kernels, one after the other."""

    kernels: tuple[WantedKernel, ...]
    kernel_rng_seed: int


class JobRequest(FrozenContract):
    """One line to the sandbox."""

    limits: Limits
    job: ExamineJob | BuildJob


class JobResult(FrozenContract):
    """How a job ended, told by the sandbox itself; ``size`` bytes of answer follow.

    ``failure`` is why the answer is missing or cut off.
    """

    failure: Remark | None = None
    size: Count = 0


class Examination(FrozenContract):
    """What became of a blueprint: a refusal to build it, a check that it failed, or its measurements."""

    @model_validator(mode="after")
    def _passed_by_checks(self) -> Self:
        if self.build_error is None and self.check_error is None and not (self.checks and self.measurements):
            raise ValueError("it says neither what was refused nor what was checked")
        return self

    build_error: Remark | None = None
    check_error: Remark | None = None
    examiner: ShortName = "unknown"
    checks: tuple[ShortName, ...] = ()
    measurements: tuple[Measurement, ...] = ()


class KernelHeader(FrozenContract):
    """What comes before the bytes of a kernel; ``refusal`` is why there are none."""

    refusal: Remark | None = None
    num_parameters: Count = 0
    size: Count = 0


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """A kernel as it came out of the sandbox."""

    header: KernelHeader
    data: bytes


def reason_of(text: object) -> str:
    """A reason for the log: one printable line, not too long, whatever was quoted in it."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).encode(errors="replace").decode()
    return line if len(line) <= MAX_REASON_CHARS else line[: MAX_REASON_CHARS - 3] + "..."


def frame(header: KernelHeader, data: bytes = b"") -> bytes:
    """A kernel on its way out of the sandbox."""
    head = header.model_dump_json().encode()
    return len(head).to_bytes(HEADER_BYTES, "big") + head + data


def frames(answer: bytes) -> Iterator[BuiltKernel]:
    """The kernels in an answer; one that was cut off at the end is left out.

    Raises:
        ContractError: the answer is not of frames.
    """
    view, at = memoryview(answer), 0
    while at + HEADER_BYTES <= len(view):
        start = at + HEADER_BYTES
        end = start + int.from_bytes(view[at:start], "big")
        if end - start > MAX_HEADER_BYTES:
            raise ContractError(f"the sandbox sent a header of {end - start} bytes")
        if end > len(view):
            return
        header = KernelHeader.model_validate_json(bytes(view[start:end]))
        at = end + header.size
        if at > len(view):
            return
        yield BuiltKernel(header, bytes(view[end:at]))
