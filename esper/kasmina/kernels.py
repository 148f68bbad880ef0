"""Kernels: a blueprint's weights for one layer kind and width, as safetensors with the spec inside.

The bytes of a kernel are deterministic and named by their SHA-256. Loading verifies hash, size, header,
spec and shapes, in this order, before a tensor is made; nothing is ever unpickled.

A kernel as it is shipped is one to begin with: float32, finite, and its module gives exactly 0. What a seed
has become, in a checkpoint, is any weights of the same names and shapes (docs/design/decisions/0010).
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from esper.errors import KernelError
from esper.kasmina.catalogue import CATALOGUE, MAX_KERNEL_BYTES
from esper.kasmina.modules import build_module
from esper.schemas.assets import BlueprintSpec
from esper.schemas.base import BlueprintId, FrozenContract
from esper.schemas.enums import LayerKind

FORMAT = "esper-kernel-1"

MAX_GROWN_BYTES = 2 * MAX_KERNEL_BYTES
"""Of one in a checkpoint: its layer may compute in float64."""

MAX_HEADER_BYTES = 64 * 1024
"""A kernel has a handful of tensors and one description; a longer header is not parsed."""

MAX_DETAIL_CHARS = 200
"""How much of what somebody else wrote an error quotes."""

SHIPPED_TYPE = "F32"
GROWN_TYPES = ("F32", "F64", "F16", "BF16")
"""What safetensors calls the types that weights may have."""


class _Description(FrozenContract):
    """What a kernel says of itself, in the header."""

    format: Literal["esper-kernel-1"]
    blueprint_id: BlueprintId
    spec: str
    kind: LayerKind
    num_features: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}$")]


class _TensorEntry(FrozenContract):
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, eq=False)
class LoadedKernel:
    """A verified kernel: what it is, and its weights on the CPU."""

    kernel_sha256: str
    blueprint_id: str
    spec: BlueprintSpec
    kind: LayerKind
    num_features: int
    weights: dict[str, Tensor]

    @property
    def num_parameters(self) -> int:
        """How many numbers it learns."""
        return sum(w.numel() for w in self.weights.values())

    def build(self) -> nn.Module:
        """The module with copies of the weights; draws no random number.

        Raises:
            KernelError: names or shapes do not match the spec.
        """
        module = _skeleton(self.spec, self.kind, self.num_features)
        try:
            module.load_state_dict({n: w.clone() for n, w in self.weights.items()}, assign=True)
        except RuntimeError as error:
            raise _refusal(self.kernel_sha256, f"does not fit its spec: {error}") from error
        return module.requires_grad_(True)


def build_kernel(blueprint_id: str, spec: BlueprintSpec, kind: LayerKind, num_features: int, *, seed: int = 0) -> bytes:
    """The bytes of a fresh kernel. The same arguments give the same bytes.

    Raises:
        KernelError: the spec cannot be built for this layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_module(spec, kind, num_features)
    return pack(blueprint_id, spec, kind, num_features, dict(module.state_dict()))


def pack(
    blueprint_id: str, spec: BlueprintSpec, kind: LayerKind, num_features: int, weights: dict[str, Tensor]
) -> bytes:
    """The bytes of a kernel with these weights."""
    described = {
        "format": FORMAT,
        "blueprint_id": blueprint_id,
        "spec": spec.model_dump_json(),
        "kind": str(kind),
        "num_features": str(num_features),
    }
    text = json.dumps(described, sort_keys=True)  # one entry: safetensors does not keep the order of several
    return save({n: w.detach().cpu().contiguous() for n, w in weights.items()}, {"esper": text})


def load_kernel(data: bytes, kernel_sha256: str, *, max_bytes: int = MAX_KERNEL_BYTES) -> LoadedKernel:
    """Verify and read the bytes of a kernel as it was shipped.

    Raises:
        KernelError: too large, not the bytes of this hash, not a kernel, not what its spec builds, or not one
            to begin with (see the module).
    """
    if len(data) > max_bytes:
        raise _refusal(kernel_sha256, f"has {len(data)} bytes, more than {max_bytes}", "choose a smaller blueprint")
    if hashlib.sha256(data).hexdigest() != kernel_sha256:
        raise KernelError(f"the bytes are not those of kernel {kernel_sha256[:12]}: fetch it again")
    kernel = _read(data, kernel_sha256, (SHIPPED_TYPE,))
    if not all(bool(torch.isfinite(w).all()) for w in kernel.weights.values()):
        raise _refusal(kernel_sha256, "has weights that are not finite")
    for name in CATALOGUE[kernel.spec.module].starts_at_zero:
        if bool(kernel.weights[name].any()):
            raise _refusal(kernel_sha256, f"would change its layer at once: {name} must be all zero")
    return kernel


def load_grown(data: bytes) -> LoadedKernel:
    """Read what ``pack`` made of a seed, in whatever state its weights are.

    Raises:
        KernelError: too large, not a kernel, or not what its spec builds.
    """
    digest = hashlib.sha256(data).hexdigest()
    if len(data) > MAX_GROWN_BYTES:
        raise _refusal(digest, f"has {len(data)} bytes, more than {MAX_GROWN_BYTES}", "no seed can have grown so large")
    return _read(data, digest, GROWN_TYPES)


def _read(data: bytes, kernel_sha256: str, types: tuple[str, ...]) -> LoadedKernel:
    """The kernel in the bytes. Only ``load``, the last step, makes tensors: of no more bytes than ``data`` has."""
    try:
        description, entries = _header(data)
        spec = BlueprintSpec.model_validate_json(description.spec, strict=True)
        num_features = int(description.num_features)
    except (ValueError, ValidationError) as error:
        raise _refusal(kernel_sha256, f"is malformed: {error}") from error
    expected = {n: tuple(p.shape) for n, p in _skeleton(spec, description.kind, num_features).state_dict().items()}
    told = {n: e.shape for n, e in entries.items()}
    if told != expected:
        raise _refusal(kernel_sha256, f"does not fit its spec: it has {told}, not {expected}")
    wrong = sorted({e.dtype for e in entries.values()} - set(types))
    if wrong:
        raise _refusal(kernel_sha256, f"has weights of type {', '.join(wrong)}, not {' or '.join(types)}")
    try:
        weights = load(data)
    except (SafetensorError, ValueError) as error:
        raise _refusal(kernel_sha256, f"is malformed: {error}") from error
    if {n: tuple(w.shape) for n, w in weights.items()} != expected:  # a name twice: parsers choose as they like
        raise _refusal(kernel_sha256, "is malformed: its header can be read in two ways")
    return LoadedKernel(kernel_sha256, description.blueprint_id, spec, description.kind, num_features, weights)


def _header(data: bytes) -> tuple[_Description, dict[str, _TensorEntry]]:
    size = int.from_bytes(data[:8], "little")
    if not 0 < size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"a header of {size} bytes; {MAX_HEADER_BYTES} at most")
    header = from_json(data[8 : 8 + size], allow_inf_nan=False)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("the header has no metadata")
    described = _Description.model_validate_json(str(header.pop("__metadata__").get("esper")))
    return described, {name: _TensorEntry.model_validate(entry) for name, entry in header.items()}


def _skeleton(spec: BlueprintSpec, kind: LayerKind, num_features: int) -> nn.Module:
    """The module without memory for its weights."""
    with torch.device("meta"):
        return build_module(spec, kind, num_features)


def _refusal(kernel_sha256: str, what: str, remedy: str = "let Urza build it anew") -> KernelError:
    told = " ".join(what.split())
    if len(told) > MAX_DETAIL_CHARS:
        told = told[: MAX_DETAIL_CHARS - 3] + "..."
    return KernelError(f"kernel {kernel_sha256[:12]} {told}: {remedy}")
