"""Seeds in a checkpoint: what has grown, and where every seed stands, as plain values and tensors.

Invariant: seeds come back in the order in which they joined the optimizer, so that its own
state_dict, which knows parameters by their place, fits them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from esper.kasmina.kernels import LoadedKernel, load_grown, pack

if TYPE_CHECKING:
    from esper.kasmina.model import MorphableModel


def pack_seeds(model: "MorphableModel") -> dict[str, Any]:
    """All that has grown and where every seed stands; loads with ``weights_only=True``."""
    kernels = []
    for (layer_id, seed_id), kernel in model.held.items():
        seed = model.layers[layer_id].awake.get(seed_id)
        weights = dict(seed.module.state_dict()) if seed else kernel.weights
        packed = pack(kernel.blueprint_id, kernel.spec, kernel.kind, kernel.num_features, weights)
        kernels.append(
            {
                "layer_id": layer_id,
                "seed_id": seed_id,
                "kernel_sha256": kernel.kernel_sha256,
                "is_awake": seed is not None,
                "has_run": seed is not None and seed.has_run,
                "packed": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
            }
        )
    return {"arrays": model.state.to_lists(), "kernels": kernels}


def unpack_seeds(model: "MorphableModel", state: Mapping[str, Any], optimizer: Optimizer | None) -> None:
    """Grow what had grown. Breakers begin closed.

    Raises:
        ContractError: the state is of another model.
    """
    model.state.load_lists(state["arrays"])
    for entry in state["kernels"]:
        kernel = _unpack(entry)
        model.state.kernels.add(kernel.kernel_sha256)
        handle = model.handle(entry["layer_id"], entry["seed_id"])
        if entry["is_awake"]:
            model.install(handle, entry["seed_id"], kernel, optimizer).has_run = entry["has_run"]
            model.follow_state(handle, entry["seed_id"])
        else:
            model.held[handle.layer_id, entry["seed_id"]] = kernel


def _unpack(entry: Mapping[str, Any]) -> LoadedKernel:
    grown = load_grown(entry["packed"].numpy().tobytes())
    return replace(grown, kernel_sha256=entry["kernel_sha256"])
