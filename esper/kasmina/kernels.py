"""Kernels: a blueprint's weights for one layer kind and width, as safetensors with the spec inside.

The bytes of a kernel are deterministic and named by their SHA-256. Loading verifies hash, size,
header and shapes before anything is built; nothing is ever unpickled.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from esper.errors import KernelError
from esper.kasmina.catalogue import build_module, num_parameters
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind

FORMAT = "esper-kernel-1"
MAX_KERNEL_BYTES = 256 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024


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
        with torch.device("meta"):
            module = build_module(self.spec, self.kind, self.num_features)
        try:
            module.load_state_dict({n: w.clone() for n, w in self.weights.items()}, assign=True)
        except RuntimeError as error:
            raise KernelError(f"kernel {self.kernel_sha256[:12]} does not fit its spec: {error}") from error
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
    """Verify and read the bytes of a kernel.

    Raises:
        KernelError: too large, not the bytes of this hash, not a kernel, or not what its spec builds.
    """
    if len(data) > max_bytes:
        raise KernelError(f"kernel {kernel_sha256[:12]} has {len(data)} bytes, more than {max_bytes}")
    if hashlib.sha256(data).hexdigest() != kernel_sha256:
        raise KernelError(f"the bytes are not those of kernel {kernel_sha256[:12]}")
    described = _description(data, kernel_sha256)
    try:
        kernel = LoadedKernel(
            kernel_sha256,
            described["blueprint_id"],
            BlueprintSpec.model_validate_json(described["spec"]),
            LayerKind(described["kind"]),
            int(described["num_features"]),
            load(data),
        )
    except (KeyError, ValueError, ValidationError, SafetensorError) as error:
        raise KernelError(f"kernel {kernel_sha256[:12]} is malformed: {error}") from error
    kernel.build()
    return kernel


def _description(data: bytes, kernel_sha256: str) -> dict[str, Any]:
    try:
        size = int.from_bytes(data[:8], "little")
        if not 0 < size <= min(MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError(f"header of {size} bytes")
        described = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["esper"])
        if described["format"] != FORMAT:
            raise ValueError(f"format {described['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(f"kernel {kernel_sha256[:12]} is malformed: {error!r}") from error
    return dict(described)


def parameters_of(spec: BlueprintSpec, kind: LayerKind, num_features: int) -> int:
    """How many parameters a kernel would have, without building it."""
    with torch.device("meta"):
        return num_parameters(build_module(spec, kind, num_features))
