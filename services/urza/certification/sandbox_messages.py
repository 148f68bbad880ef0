"""Jobs of the sandbox and their results: data alone, read by pydantic, never unpickled.

No torch: both sides import this module. Urza treats what comes out of the sandbox as untrusted input.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from esper.errors import ContractError
from esper.schemas.assets import BlueprintSpec, Measurement
from esper.schemas.base import BlueprintId, Count, FrozenContract, NumFeatures, Remark, ShortName
from esper.schemas.enums import LayerKind

MAX_REASON_CHARS = 500
HEADER_LENGTH_BYTES = 4  # the length of a frame's header, before it
MAX_HEADER_BYTES = 64 * 1024
MAX_EXAMINED_BYTES = 4 * 1024 * 1024
"""Of the kernels that one examination returns; the kernel builder builds the others."""


class Limits(FrozenContract):
    """What one job may use before its worker process is killed."""

    wall_s: float
    cpu_s: int
    memory_bytes: Annotated[int, Field(description="Beyond what the sandbox has when it starts.")]
    output_bytes: int


class ExamineJob(FrozenContract):
    """Build a blueprint's module in layers of these widths, and check and measure it."""

    blueprint_id: BlueprintId
    spec: BlueprintSpec
    widths: tuple[NumFeatures, ...]
    kernel_rng_seed: int


class WantedKernel(FrozenContract):
    """A kernel that a run can request."""

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
    """One line on the sandbox's stdin."""

    limits: Limits
    job: ExamineJob | BuildJob


class JobResult(FrozenContract):
    """One line on the sandbox's stdout: how a job ended. ``size`` bytes of output follow.

    ``failure`` is why the output is missing or cut off.
    """

    failure: Remark | None = None
    size: Count = 0


class ExaminedKernel(FrozenContract):
    """A kernel whose module passed its examination; verified in the sandbox as a built one, by the trainer's checks."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    target: LayerKind
    num_features: NumFeatures
    num_parameters: Count
    data: bytes


class Examination(FrozenContract):
    """The result of examining a blueprint: why it cannot be built, the check that it fails, or its measurements."""

    build_error: Remark | None = None
    check_error: Remark | None = None
    examiner: ShortName = "unknown"
    checks: tuple[ShortName, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    kernels: tuple[ExaminedKernel, ...] = ()

    @model_validator(mode="after")
    def _check_result(self) -> Self:
        has_passed = self.build_error is None and self.check_error is None
        if has_passed and not (self.checks and self.measurements):
            raise ValueError("an examination without an error needs checks and measurements")
        if self.kernels and not has_passed:
            raise ValueError("an examination with an error has no kernels")
        return self


class KernelHeader(FrozenContract):
    """Precedes the bytes of a kernel; ``refusal`` is why there are none."""

    refusal: Remark | None = None
    num_parameters: Count = 0
    size: Count = 0


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """A kernel as the sandbox built it."""

    header: KernelHeader
    data: bytes


def reason_of(text: object) -> str:
    """A reason for the log: one printable line of at most ``MAX_REASON_CHARS``, whatever the text quotes."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).encode(errors="replace").decode()
    return line if len(line) <= MAX_REASON_CHARS else line[: MAX_REASON_CHARS - 3] + "..."


def encode_frame(header: KernelHeader, data: bytes = b"") -> bytes:
    """A kernel on its way out of the sandbox: length of the header, header, bytes."""
    head = header.model_dump_json().encode()
    return len(head).to_bytes(HEADER_LENGTH_BYTES, "big") + head + data


def decode_frames(output: bytes) -> Iterator[BuiltKernel]:
    """The kernels in an output; one that is cut off at the end is left out.

    Raises:
        ContractError: the output does not consist of frames.
    """
    view, at = memoryview(output), 0
    while at + HEADER_LENGTH_BYTES <= len(view):
        start = at + HEADER_LENGTH_BYTES
        end = start + int.from_bytes(view[at:start], "big")
        if end - start > MAX_HEADER_BYTES:
            raise ContractError(
                f"sandbox: a frame's header has {end - start} bytes, at most {MAX_HEADER_BYTES} allowed"
            )
        if end > len(view):
            return
        header = KernelHeader.model_validate_json(bytes(view[start:end]))
        at = end + header.size
        if at > len(view):
            return
        yield BuiltKernel(header, bytes(view[end:at]))
