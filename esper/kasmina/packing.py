"""Seeds in a checkpoint: what has grown, and where every seed stands, as plain values and tensors.

Invariant: seeds come back in the order in which they joined the optimizer, so that its own
state_dict, which knows parameters by their place, fits them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.errors import ContractError
from esper.kasmina import optimizers
from esper.kasmina.kernels import LoadedKernel, load_grown, pack
from esper.kasmina.planning import verify_fits

if TYPE_CHECKING:
    from esper.kasmina.model import MorphableModel

FORMAT = 2
"""Of seeds in a checkpoint. The first format had no number."""


def pack_seeds(model: "MorphableModel") -> dict[str, Any]:
    """All that has grown and where every seed stands; loads with ``weights_only=True``."""
    kernels = []
    for (layer_id, seed_id), kernel in model.held.items():
        seed = model.layers[layer_id].awake.get(seed_id)
        # under embargo a seed has no weights any more: only what it was is told
        weights = seed.module.state_dict() if seed else {n: torch.zeros_like(w) for n, w in kernel.weights.items()}
        kernels.append(
            {
                "layer_id": layer_id,
                "seed_id": seed_id,
                "kernel_sha256": kernel.kernel_sha256,
                "is_awake": seed is not None,
                "has_run": seed is not None and seed.has_run,
                "packed": pack_kernel(kernel, dict(weights)),
            }
        )
    return {"format": FORMAT, "arrays": model.state.to_lists(), "kernels": kernels}


def unpack_seeds(model: "MorphableModel", state: Mapping[str, Any], optimizer: Optimizer | None) -> None:
    """Grow what had grown, in place of what has grown since. Breakers begin closed.

    Raises:
        ContractError: the state is of another model, or of another format; nothing has changed.
    """
    if state.get("format") != FORMAT:
        raise ContractError(f"seeds of format {state.get('format', 1)}: this Esper reads format {FORMAT}")
    kernels = [_checked(model, entry, optimizer) for entry in state["kernels"]]
    model.state.load_lists(state["arrays"])
    for handle in model.layers.values():
        for seed_id in list(handle.awake):
            model.uninstall(handle, seed_id, optimizer)
    model.held.clear()
    for entry, kernel in zip(state["kernels"], kernels, strict=True):
        handle = model.handle(entry["layer_id"], entry["seed_id"])
        if entry["is_awake"]:
            model.install(handle, entry["seed_id"], kernel, optimizer).has_run = entry["has_run"]
        else:
            model.held[handle.layer_id, entry["seed_id"]] = kernel
    model.follow_all()


def _checked(model: "MorphableModel", entry: Mapping[str, Any], optimizer: Optimizer | None) -> LoadedKernel:
    handle = model.handle(entry["layer_id"], entry["seed_id"])
    kernel = unpack_kernel(entry["packed"], entry["kernel_sha256"])
    verify_fits(kernel, handle)
    if optimizer is not None:
        optimizers.verify_can_join(optimizer, handle.module, kernel.weights)
    model.state.kernels.add(kernel.kernel_sha256)
    return kernel


def pack_kernel(kernel: LoadedKernel, weights: dict[str, Tensor]) -> Tensor:
    """A kernel with the weights that it has come to, as one uint8 tensor."""
    packed = pack(kernel.blueprint_id, kernel.spec, kernel.kind, kernel.num_features, weights)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack_kernel(packed: Tensor, kernel_sha256: str) -> LoadedKernel:
    """The inverse of ``pack_kernel``; the kernel keeps the hash of the one that it grew from.

    Raises:
        KernelError: the bytes are no kernel.
    """
    return replace(load_grown(packed.numpy().tobytes()), kernel_sha256=kernel_sha256)
