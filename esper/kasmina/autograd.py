"""How a seed joins its host's graph of gradients: so that it can neither break nor poison it.

``SeedCall`` is one node of the host's graph, whatever happens inside: the seed's own graph lies
behind it, and what fails there, forwards or backwards, leaves the host with its own output and
gradient. It saves no tensor in the host's graph, so activation checkpoints see the same graph
when they run the layer again, even where the seed then behaves differently.

``Isolated`` and ``Guarded`` do the same with ordinary operations, for code that is compiled or
differentiated twice, where nothing can be caught and every decision is a tensor.

h: a host's output, (N, ...); s: what a seed adds to it, of the shape of h; g: the gradient of
the loss with respect to the layer's output.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from esper.errors import NotSupportedError
from esper.kasmina.watchdog import TimeLimit

if TYPE_CHECKING:
    from esper.kasmina.seeds import AwakeSeed

PULL = 1.0
"""How strongly an isolated seed is held near zero; 1 lets it take one gradient step in activations."""

Pull = float | Tensor
"""PULL times the scale of the loss, as an AMP GradScaler has it."""


def is_finite(values: Tensor) -> Tensor:
    """Whether all of ``values`` are finite: a boolean without dimensions, on its device."""
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    return torch.isfinite(torch.linalg.vector_norm(values.detach(), math.inf))


def are_finite(values: Sequence[Tensor]) -> bool:
    """Whether all values of all tensors are finite; for tensors on the CPU, where asking waits for nobody."""
    there = [v.detach() for v in values if v.numel()]
    norms = (
        torch._foreach_norm(there, math.inf)
        if len(there) > 1
        else [torch.linalg.vector_norm(v, math.inf) for v in there]
    )
    return all(math.isfinite(norm.item()) for norm in norms)


def isolated_gradient(g: Tensor, s: Tensor, num_samples: int, num_features: int, pull: Pull = PULL) -> Tensor:
    """The gradient of a seed in TRAINING: (g + pull * s / N) / P, P positions of F features in each of N samples.

    The seed learns as if it were added, and its host never notices. The pull is the gradient of
    pull * |s|^2 / 2N: nothing that s does comes back through the loss while it is isolated, and
    without the pull it would grow without bound. Both are divided by P, since the curvature of
    the pull grows with the number of positions (docs/design/decisions/0004). Where a GradScaler is, in float32: the
    pull of a scaled loss is as large as its scale, which half precision does not hold.
    """
    num_positions = max(1, s.numel() // (num_samples * num_features))
    if isinstance(pull, Tensor):
        exact = torch.promote_types(g.dtype, torch.float32)
        return ((g.to(exact) + pull / num_samples * s.to(exact)) / num_positions).to(g.dtype)
    held = torch.add(g, s, alpha=pull / num_samples)
    return held if num_positions == 1 else held / num_positions


class Inner(NamedTuple):
    """What lies behind one call of a seed: s and the graph that made it from x and the parameters.

    ``ok`` is whether s is finite, where only the device knows. ``learns`` are the places of
    ``parameters`` among those that the call was given.
    """

    s: Tensor
    ok: Tensor | None
    x: Tensor
    parameters: list[Tensor]
    learns: list[int]
    gain: float


class SeedCall(torch.autograd.Function):
    """The output of a layer with one seed in it: h itself while the seed is isolated or fails, else h + alpha * s."""

    @staticmethod
    def forward(ctx: Any, seed: "AwakeSeed", h: Tensor, *parameters: Tensor) -> Tensor:
        """``parameters`` are the seed's; given so that their gradients arrive where they belong."""
        ctx.set_materialize_grads(False)
        ctx.seed, ctx.num_parameters, ctx.inner = seed, len(parameters), None
        unchanged = h.clone()  # a layer that works in place may come next, and a seed may write into h
        x = h.detach()
        with torch.enable_grad():
            if not seed.is_isolated:
                x.requires_grad_(ctx.needs_input_grad[1])
            tried = seed.attempt(x)
        if tried is None:
            return unchanged
        s, ok = tried
        learns = [n for n, p in enumerate(parameters) if p.requires_grad]
        ctx.inner = Inner(s, ok, x, [parameters[n] for n in learns], learns, seed.gain)
        if seed.is_isolated:
            return unchanged
        blended = torch.add(unchanged, s.detach(), alpha=seed.gain)
        return blended if ok is None else torch.where(ok, blended, unchanged)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """g for h, and what the seed's own graph makes of it."""
        if torch.is_grad_enabled():
            raise NotSupportedError(
                "a layer with awake seeds is differentiated twice (create_graph=True): "
                "set model.differentiable_twice = True before such a step, or bake() the model"
            )
        (g,) = gradients
        of_h, of_parameters = g, [None] * ctx.num_parameters
        if g is not None and ctx.inner is not None:
            inner: Inner = ctx.inner
            if not _keeps_graph():
                ctx.inner = None
            found = _seed_gradients(ctx.seed, g, inner)
            if found is not None:
                of_x, of_learnt = found
                for n, gradient in zip(inner.learns, of_learnt, strict=True):
                    of_parameters[n] = gradient
                of_h = g if of_x is None else g + of_x
                if inner.ok is None:  # else only the device knows, and ``settle`` hears of it
                    ctx.seed.breaker.succeeded()
        return None, of_h, *of_parameters


def _seed_gradients(seed: "AwakeSeed", g: Tensor, inner: Inner) -> tuple[Tensor | None, list[Any]] | None:
    """The gradients behind one call, of its input and its parameters; None where the seed fails."""
    s, x, parameters = inner.s, inner.x, inner.parameters
    if not s.requires_grad:
        return None, [None] * len(parameters)
    of_s = seed.isolated_gradient(g, s.detach()) if seed.is_isolated else g * inner.gain
    if inner.ok is not None:
        of_s = torch.where(inner.ok, of_s, 0.0)
    wanted = [*parameters, x] if x.requires_grad else parameters
    try:
        with TimeLimit(seed.time_limit_s):
            found = torch.autograd.grad(s, wanted, of_s, retain_graph=_keeps_graph(), allow_unused=True)
    except Exception as error:  # whatever a seed raises: the host's own gradient is all there
        seed.breaker.failed(f"backward: {type(error).__name__}: {error}")
        return None
    kept = _finite_gradients(found)
    if kept is None:
        # not the seed's doing where the loss itself is not finite, or its scale may be too large
        if are_finite([g]) and not seed.is_scaled:
            seed.breaker.failed("a gradient is not finite", is_grave=True)
        return None
    return (kept[-1], kept[:-1]) if x.requires_grad else (None, kept)


def _finite_gradients(found: tuple[Tensor | None, ...]) -> list[Any] | None:
    """The gradients, unless one is not finite. On an accelerator that one is made zero, and nothing waits."""
    if all(f is None or f.device.type == "cpu" for f in found):
        return list(found) if are_finite([f for f in found if f is not None]) else None
    return [f if f is None else torch.where(is_finite(f), f, 0.0) for f in found]


def _keeps_graph() -> bool:
    """Whether this backward pass was asked to retain the graph; True where torch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


class Isolated(torch.autograd.Function):
    """h unchanged to the bit, its gradient too; s learns as if it were added (see ``isolated_gradient``)."""

    @staticmethod
    def forward(h: Tensor, s: Tensor, ok: Tensor, num_samples: int, num_features: int, pull: Pull) -> Tensor:
        """h, s of one shape; ok: whether s may learn from this call; the others as in ``isolated_gradient``."""
        return h.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Keep what the gradient of s is made of."""
        _h, s, ok, *ctx.how = inputs
        ctx.save_for_backward(s, ok)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient for h, and for s."""
        s, ok = ctx.saved_tensors
        of_s = isolated_gradient(gradients[0], s, *ctx.how)
        return gradients[0], torch.where(ok, of_s, 0.0), None, None, None, None


class Guarded(torch.autograd.Function):
    """The same values; a gradient that is not finite does not get through."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        """A view of ``values``."""
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient, or zeros."""
        return torch.where(is_finite(gradients[0]), gradients[0], 0.0)
