"""Health signals: what a layer's output and gradient say, seed by seed, on sampled steps only.

Owns when layers are watched, and the score; esper.kasmina.readings has the statistics, and
docs/reference/health-signals.md says what each means. Invariant: a probe that is not armed is nowhere in the
model's path, and one that is armed changes no value of it.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.kasmina.hosts import CHANNEL_DIM, host_type, output_of
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.readings import ChunkStatistics, Reading
from esper.kasmina.samples import GradientSample, OutputSample, sample_gradient, sample_output
from esper.kasmina.stance import Hold, hold_eager, let_go
from esper.schemas.operational import HealthSignal

SPREAD = 0.01
"""The standard deviation at which the score is halved: an output that hardly varies carries little."""

Measured = tuple[int, int, dict[str, tuple[HealthSignal, ...]]]
"""Step, epoch, and the signals by layer, in the model's order; a layer's are in the order of its seeds."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A sampled step whose numbers are on their way."""

    step: int
    epoch: int
    readings: tuple[Reading, ...]  # one for each device
    layer_ids: tuple[str, ...]


class HealthProbe:
    """Watches the layers' forward passes while it is armed.

    Of several calls of a layer the last one counts. A call in eval mode without gradients is not
    watched: it is an evaluation, not training. A copy of a probe, pickled or deep, is not armed and
    has nothing under way.
    """

    def __init__(self, layers: Iterable[KasminaLayer]) -> None:
        self._layers = tuple(layers)
        self._outputs: dict[str, OutputSample] | None = None  # seen since it was armed
        self._stop: Callable[[], object] = _nothing
        self._pending: deque[_Pending] = deque()
        self._seen: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        HealthProbe.__init__(self, state["layers"])

    @property
    def is_armed(self) -> bool:
        """Whether forward passes are watched."""
        return self._outputs is not None

    @property
    def silent_layers(self) -> tuple[str, ...]:
        """Layers that no watched pass has called so far; none before the first watched pass.

        Their forward is bypassed: a parent that reads ``.weight`` does so.
        """
        return tuple(layer.layer_id for layer in self._layers if layer.layer_id not in self._seen) if self._seen else ()

    def arm(self) -> None:
        """Watch from here on; what is compiled runs eagerly meanwhile. Again: forget what was seen."""
        self.disarm()
        self._outputs = {}
        hooks = [layer.module.register_forward_hook(_Watch(layer, self._outputs)) for layer in self._layers]
        hold = hold_eager()
        self._stop = weakref.finalize(self, _stop_watching, hooks, hold)

    def disarm(self) -> None:
        """Stop watching, and forget what was seen since ``arm``."""
        self._stop()
        self._outputs = None

    @torch.no_grad()
    def collect(self, step: int, epoch: int) -> None:
        """Stop watching, and send what was seen to the host; does not wait. Gradients are those in ``.grad``."""
        outputs = self._outputs or {}
        self.disarm()
        by_device: dict[torch.device, dict[str, OutputSample]] = {}
        gradients: dict[str, list[GradientSample]] = {}
        for layer in (layer for layer in self._layers if layer.layer_id in outputs):
            device = outputs[layer.layer_id].values.device
            by_device.setdefault(device, {})[layer.layer_id] = outputs[layer.layer_id]
            gradients[layer.layer_id] = _gradients_of(layer, device)
        self._seen.update(outputs)
        if outputs:
            readings = tuple(Reading(found, gradients) for found in by_device.values())
            self._pending.append(_Pending(step, epoch, readings, tuple(gradients)))

    def finished(self) -> list[Measured]:
        """The collected steps whose numbers have arrived, in order; never waits."""
        found = []
        while self._pending and all(reading.is_done for reading in self._pending[0].readings):
            found.append(_signals_of(self._pending.popleft()))
        return found

    def drain(self, up_to_step: int | None = None) -> list[Measured]:
        """Like ``finished``, but waits for the device: for all, or for steps up to one."""
        found = []
        while self._pending and (up_to_step is None or self._pending[0].step <= up_to_step):
            found.append(_signals_of(self._pending[0]))  # it may raise: what is not told is still under way
            self._pending.popleft()
        return found

    def forget(self) -> int:
        """Drop what is under way; how many layers' signals it was."""
        dropped = sum(len(pending.layer_ids) for pending in self._pending)
        self._pending.clear()
        return dropped


class _Watch:
    """The hook on one layer. It does not hold its probe: one that is dropped stops watching.

    A copy of it, deep or pickled, is a ``_Spent``: copies of a model, such as averages of its weights,
    are not watched.
    """

    def __init__(self, layer: KasminaLayer, outputs: dict[str, OutputSample]) -> None:
        self._layer, self._outputs = layer, outputs

    def __call__(self, module: nn.Module, _args: Any, returned: Any) -> None:
        layer = self._layer
        if module is not layer.module or not (module.training or torch.is_grad_enabled()):
            return
        h = output_of(returned)
        dim = CHANNEL_DIM[layer.kind]
        if _is_readable(h) and h.ndim >= -dim and h.shape[dim] == layer.num_features:
            self._outputs[layer.layer_id] = sample_output(h, dim, layer.num_seeds)

    def __reduce__(self) -> tuple[type["_Spent"], tuple[()]]:
        return _Spent, ()


class _Spent:
    """What a copied module has in place of the watch: it takes itself out when it is first called."""

    def __call__(self, module: nn.Module, _args: Any, _returned: Any) -> None:
        for key in [key for key, hook in module._forward_hooks.items() if hook is self]:
            del module._forward_hooks[key]


def _stop_watching(hooks: Sequence[RemovableHandle], hold: Hold) -> None:
    for hook in hooks:
        hook.remove()
    let_go(hold)


def _nothing() -> None:
    """What stops a watch that never began."""


def health_score(chunk: ChunkStatistics) -> float:
    """(1 - dead_ratio) * std / (std + SPREAD), in 0..1; 0 where any statistic is not finite. Esper's own."""
    taken = (chunk.mean, chunk.std, chunk.dead_ratio, chunk.gradient_norm, chunk.effective_rank)
    if not all(value is None or math.isfinite(value) for value in taken):
        return 0.0
    return (1.0 - chunk.dead_ratio) * chunk.std / (chunk.std + SPREAD)


def _is_readable(h: Any) -> bool:
    """Whether an output has values to read now: not while something traces, captures or maps the model."""
    if type(h) is not Tensor or h.numel() == 0 or h.is_complex() or h.is_meta or h.layout is not torch.strided:
        return False
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # documented, but not exported
    if is_traced or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(h):
        return False
    return not (h.is_cuda and torch.cuda.is_current_stream_capturing())


def _gradients_of(layer: KasminaLayer, device: torch.device) -> list[GradientSample]:
    """Of each of the layer's own parameters that has the layer's features as rows (or columns) and a gradient."""
    host = host_type(layer.module)
    turned = host is not None and host.has_features_last
    found = []
    for parameter in layer.module.parameters():
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided or gradient.device != device or not gradient.ndim:
            continue
        is_last = turned and gradient.ndim > 1
        if gradient.shape[-1 if is_last else 0] == layer.num_features:
            found.append(sample_gradient(gradient, layer.num_seeds, channels_last=is_last))
    return found


def _signals_of(pending: _Pending) -> Measured:
    chunks = {layer_id: found for reading in pending.readings for layer_id, found in reading.chunks().items()}
    signals = {
        layer_id: tuple(_signal(layer_id, n, pending.epoch, chunk) for n, chunk in enumerate(chunks[layer_id]))
        for layer_id in pending.layer_ids
    }
    return pending.step, pending.epoch, signals


def _signal(layer_id: str, seed_id: int, epoch: int, chunk: ChunkStatistics) -> HealthSignal:
    return HealthSignal(
        layer_id=layer_id,
        seed_id=seed_id,
        chunk_id=seed_id,
        epoch=epoch,
        health_score=health_score(chunk),
        activation_mean=chunk.mean,
        activation_std=chunk.std,
        dead_ratio=chunk.dead_ratio,
        gradient_norm=chunk.gradient_norm,
        effective_rank=chunk.effective_rank,
    )
