"""Health signals: what a layer's output and gradient say, seed by seed, on sampled steps only.

A layer's F output channels are divided among its seeds in chunks (``torch.tensor_split``).

    dead_ratio   share of a chunk's channels that are never positive in the batch
    health_score (1 - dead_ratio) * std / (std + SPREAD), 0 where anything is not finite

``SPREAD`` is the standard deviation at which the score is halved: outputs that hardly vary
carry little. Both are Esper's own definitions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.kasmina.layer import KasminaLayer
from esper.schemas.enums import LayerKind
from esper.schemas.operational import HealthSignal

SPREAD = 0.01


class HealthProbe:
    """Watches one forward pass of each layer, when armed; leaves no hook behind."""

    def __init__(self, layers: Iterable[KasminaLayer]) -> None:
        self._layers = tuple(layers)
        self._hooks: list[RemovableHandle] = []
        self._outputs: dict[str, Tensor] = {}

    @property
    def is_armed(self) -> bool:
        """Whether the next forward pass is watched."""
        return bool(self._hooks)

    def arm(self) -> None:
        """Watch the next forward pass."""
        self.disarm()
        self._hooks = [layer.module.register_forward_hook(self._keeper(layer.layer_id)) for layer in self._layers]

    def disarm(self) -> None:
        """Take the hooks out and forget what they saw."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._outputs = [], {}

    @torch.no_grad()
    def read(self, epoch: int) -> dict[str, tuple[HealthSignal, ...]]:
        """The signals of the watched pass, by layer; ends the watch. Gradients are those in ``.grad``."""
        found = {
            layer.layer_id: measure(layer, self._outputs[layer.layer_id], epoch)
            for layer in self._layers
            if layer.layer_id in self._outputs
        }
        self.disarm()
        return found

    def _keeper(self, layer_id: str):  # type: ignore[no-untyped-def]
        def keep(_module: nn.Module, _args: object, output: Tensor) -> None:
            self._outputs[layer_id] = output.detach()

        return keep


@torch.no_grad()
def measure(layer: KasminaLayer, output: Tensor, epoch: int) -> tuple[HealthSignal, ...]:
    """The signals of one layer's output: (..., F) for Linear, (N, F, H, W) for Conv2d."""
    is_conv = layer.kind is LayerKind.CONV2D
    by_channel = output.transpose(0, 1) if is_conv else output.movedim(-1, 0)
    channels = by_channel.reshape(layer.num_features, -1).float()
    weight: nn.Parameter = layer.module.weight  # type: ignore[assignment]
    gradient = weight.grad.reshape(layer.num_features, -1).float() if weight.grad is not None else None
    rows = []
    for part in torch.arange(layer.num_features, device=channels.device).tensor_split(layer.num_seeds):
        chunk = channels[part]
        rows += [chunk.mean(), chunk.std(correction=0), (chunk.amax(1) <= 0).float().mean()]
        rows.append(gradient[part].norm() if gradient is not None else chunk.new_tensor(-1.0))
    flat = torch.stack(rows).reshape(layer.num_seeds, 4).tolist()  # the one wait for the device
    return tuple(_signal(layer.layer_id, n, epoch, *values) for n, values in enumerate(flat))


def _signal(
    layer_id: str, seed_id: int, epoch: int, mean: float, std: float, dead: float, gradient: float
) -> HealthSignal:
    values = (mean, std, dead, gradient)
    is_finite = all(abs(v) < float("inf") for v in values)
    return HealthSignal.model_validate(
        {
            "layer_id": layer_id,
            "seed_id": seed_id,
            "chunk_id": seed_id,
            "epoch": epoch,
            "health_score": (1.0 - dead) * std / (std + SPREAD) if is_finite else 0.0,
            "activation_mean": mean,
            "activation_std": std,
            "dead_ratio": dead,
            "gradient_norm": None if gradient == -1.0 else gradient,
        }
    )
