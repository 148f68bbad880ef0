"""MorphableModel: a model whose chosen layers hold seeds.

Owns the arrays of state, the handles and the schedule. Moves are planned first and applied
after. While all seeds are dormant it is the plain model to the bit, and its state_dict is
the plain model's at all times; what has grown is in ``seed_state``.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import ContractError, KernelError
from esper.kasmina import optimizers
from esper.kasmina.health import HealthProbe
from esper.kasmina.kernels import LoadedKernel, load_kernel, pack
from esper.kasmina.layer import FAILURES_TO_OPEN, KasminaLayer
from esper.kasmina.lifecycle import NEXT_BY_SCHEDULE, StageSchedule, Transition
from esper.kasmina.state import SeedArrays
from esper.kasmina.topology import edges_between
from esper.schemas.assets import LayerEdge, LayerNode, Seed
from esper.schemas.enums import SeedStage, TransitionReason
from esper.schemas.lifecycle import ACTIVE_STAGES, EMBARGO_STAGES, is_allowed, way_out


class MorphableModel(nn.Module):
    """Made by ``esper.wrap``. Calls, attributes and state_dict go through to ``host``.

    Attributes:
        layers: qualified name -> handle, for each layer that holds seeds.
        schedule: how long stages last; may be set before training.
        boundary_steps: steps between boundaries, which sets how fast alpha rises.
    """

    def __init__(self, host: nn.Module, layers: Mapping[str, nn.Module], seeds_per_layer: int) -> None:
        super().__init__()
        self.host = host
        self.layers: Mapping[str, KasminaLayer] = {
            name: KasminaLayer(name, n, module, seeds_per_layer) for n, (name, module) in enumerate(layers.items())
        }
        self.schedule = StageSchedule()
        self.boundary_steps = 1
        self.state = SeedArrays(len(self.layers), max(h.num_seeds for h in self.layers.values()))
        self.probe = HealthProbe(self.layers.values())
        self._kernels: dict[tuple[str, int], LoadedKernel] = {}  # of seeds that hold one, in joining order

    # -- as a module: the host's face ------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward."""
        return self.host(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's state_dict, whatever has grown."""
        return self.host.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a plain model's state_dict."""
        return self.host.load_state_dict(state_dict, strict=strict, assign=assign)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The host's parameters under their own names, then those of grown seeds, as they joined.

        Without ``recurse`` there are none: the model itself holds no parameter. DDP asks module by
        module, so that it reduces the host's gradients and leaves those of seeds to ``Replicas``.
        """
        if not recurse:
            return
        yield from self.host.named_parameters(prefix, recurse, remove_duplicate)
        for (layer_id, seed_id), module in self._grown():
            for name, parameter in module.named_parameters():
                yield f"{prefix}{'.' if prefix else ''}kasmina.{layer_id}.{seed_id}.{name}", parameter

    def train(self, mode: bool = True) -> Self:
        """The host's mode, for grown seeds too."""
        super().train(mode)
        for _key, module in self._grown():
            module.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for _key, module in self._grown():
            module._apply(fn)  # type: ignore[no-untyped-call]
        return self

    # -- what it is -------------------------------------------------------------------------

    def graph(self) -> tuple[tuple[LayerNode, ...], tuple[LayerEdge, ...]]:
        """Nodes and edges of the graph that Tamiyo sees."""
        nodes = tuple(
            LayerNode(
                layer_id=handle.layer_id,
                kind=handle.kind,
                num_features=handle.num_features,
                num_parameters=sum(p.numel() for p in handle.module.parameters(recurse=False)),
                num_seeds=handle.num_seeds,
            )
            for handle in self.layers.values()
        )
        return nodes, edges_between(self.host, {n: h.module for n, h in self.layers.items()})

    def seed(self, layer_id: str, seed_id: int) -> Seed:
        """One seed as it stands.

        Raises:
            ContractError: there is no such seed.
        """
        handle = self._handle(layer_id, seed_id)
        at = handle.index, seed_id
        kernel = self._kernels.get((layer_id, seed_id))
        return Seed(
            layer_id=layer_id,
            seed_id=seed_id,
            stage=self.state.stage_of(*at),
            stage_since_step=int(self.state.since_step[at]),
            alpha=float(self.state.alpha[at]),
            blueprint_id=kernel.blueprint_id if kernel else None,
            kernel_sha256=kernel.kernel_sha256 if kernel else None,
        )

    def seeds_not_dormant(self) -> tuple[Seed, ...]:
        """All others, by layer and seed."""
        return tuple(
            self.seed(handle.layer_id, n)
            for handle in self.layers.values()
            for n in range(handle.num_seeds)
            if self.state.stage_of(handle.index, n) is not SeedStage.DORMANT
        )

    @property
    def num_parameters_grown(self) -> int:
        """Parameters of all seeds that are awake or fossilized."""
        return sum(p.numel() for _key, module in self._grown() for p in module.parameters())

    # -- plans: no effect yet ---------------------------------------------------------------

    def plan_germinate(self, layer_id: str, seed_id: int, kernel: LoadedKernel) -> Transition:
        """A dormant seed gets a kernel.

        Raises:
            ContractError: no such seed, or it is not dormant.
            KernelError: the kernel is of another kind or width.
        """
        handle = self._handle(layer_id, seed_id)
        if (kernel.kind, kernel.num_features) != (handle.kind, handle.num_features):
            raise KernelError(
                f"kernel {kernel.kernel_sha256[:12]} is for {kernel.kind} layers of {kernel.num_features} "
                f"features; {layer_id} is {handle.kind} of {handle.num_features}"
            )
        plan = self._plan(handle, seed_id, SeedStage.GERMINATED, TransitionReason.COMMAND)
        return Transition(
            layer_id,
            seed_id,
            plan.from_stage,
            plan.to_stage,
            plan.reason,
            kernel.blueprint_id,
            kernel.kernel_sha256,
            kernel.num_parameters,
        )

    def plan_cull(self, layer_id: str, seed_id: int) -> Transition:
        """A seed under way is given up: cancelled before grafting, culled after.

        Raises:
            ContractError: no such seed, or it is not under way.
        """
        handle = self._handle(layer_id, seed_id)
        stage = self.state.stage_of(handle.index, seed_id)
        if stage not in ACTIVE_STAGES:
            raise ContractError(f"seed {layer_id}:{seed_id} is {stage}: nothing to give up")
        return self._plan(handle, seed_id, way_out(stage), TransitionReason.COMMAND)

    def plan_fossilize(self, layer_id: str, seed_id: int) -> Transition:
        """A seed that is being evaluated becomes permanent.

        Raises:
            ContractError: no such seed, or it is not being evaluated.
        """
        handle = self._handle(layer_id, seed_id)
        return self._plan(handle, seed_id, SeedStage.FOSSILIZED, TransitionReason.COMMAND)

    def plan_advance(self, boundary: int) -> list[Transition]:
        """What the schedule moves at this boundary, and failed seeds that are given up; by layer and seed."""
        plans = []
        for handle in self.layers.values():
            for n in range(handle.num_seeds):
                stage = self.state.stage_of(handle.index, n)
                if self._has_failed(handle, n):
                    detail = f"failed {FAILURES_TO_OPEN} times or gave non-finite values"
                    plan = self._plan(handle, n, way_out(stage), TransitionReason.FAILURE)
                    plans.append(plan.because(TransitionReason.FAILURE, detail))
                elif stage in NEXT_BY_SCHEDULE:
                    to, field = NEXT_BY_SCHEDULE[stage]
                    waited = boundary - int(self.state.since_boundary[handle.index, n])
                    if waited >= getattr(self.schedule, field):
                        plans.append(self._plan(handle, n, to, _reason_of(stage)))
        return plans

    # -- effects ----------------------------------------------------------------------------

    def apply_transition(
        self,
        plan: Transition,
        *,
        step: int,
        boundary: int,
        kernel: LoadedKernel | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Carry a plan out. New parameters join ``optimizer``; those of a seed given up leave it.

        Raises:
            ContractError: the seed is not where the plan found it.
        """
        handle = self._handle(plan.layer_id, plan.seed_id)
        key = (plan.layer_id, plan.seed_id)
        if self.state.stage_of(handle.index, plan.seed_id) is not plan.from_stage:
            raise ContractError(f"seed {plan.layer_id}:{plan.seed_id} is not {plan.from_stage} any more")
        if kernel is not None and optimizer is not None:
            optimizers.verify_can_join(optimizer, handle.module, kernel.weights)
        self.state.move(handle.index, plan.seed_id, plan.to_stage, step=step, boundary=boundary)
        if plan.to_stage is SeedStage.GERMINATED:
            if kernel is None:
                raise ContractError("a seed germinates with its kernel")
            self._install(handle, plan.seed_id, kernel, optimizer)
        elif plan.to_stage in EMBARGO_STAGES:
            gone = handle.sleep(plan.seed_id)
            if optimizer is not None:
                optimizers.leave(optimizer, gone.module.parameters())
        elif plan.to_stage is SeedStage.DORMANT:
            self._kernels.pop(key, None)
        self._follow_state(handle, plan.seed_id, step)

    def on_step(self, step: int) -> None:
        """Move alpha of seeds that are being grafted: linear over the stage, a function of the step."""
        for handle in self.layers.values():
            for n, seed in handle.awake.items():
                if seed.stage is SeedStage.GRAFTING:
                    self._follow_state(handle, n, step)

    # -- checkpoints ------------------------------------------------------------------------

    def seed_state(self) -> dict[str, Any]:
        """All that has grown and where every seed stands; loads with ``weights_only=True``."""
        kernels = []
        for (layer_id, seed_id), kernel in self._kernels.items():
            seed = self.layers[layer_id].awake.get(seed_id)
            weights = dict(seed.module.state_dict()) if seed else kernel.weights
            packed = pack(kernel.blueprint_id, kernel.spec, kernel.kind, kernel.num_features, weights)
            kernels.append(
                {
                    "layer_id": layer_id,
                    "seed_id": seed_id,
                    "kernel_sha256": kernel.kernel_sha256,
                    "errors": seed.num_failures if seed else 0,
                    "is_awake": seed is not None,
                    "packed": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
                }
            )
        return {"arrays": self.state.to_lists(), "kernels": kernels}

    def load_seed_state(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        """Grow what had grown, in the order in which it joined the optimizer.

        Call it on a freshly wrapped model, before the optimizer's own state is loaded.

        Raises:
            ContractError: the state is of another model.
        """
        self.state.load_lists(state["arrays"])
        for entry in state["kernels"]:
            kernel = _unpack(entry)
            handle = self._handle(entry["layer_id"], entry["seed_id"])
            if entry["is_awake"]:
                self._install(handle, entry["seed_id"], kernel, optimizer)
                handle.awake[entry["seed_id"]].errors = entry["errors"]
                self._follow_state(handle, entry["seed_id"], None)
            else:
                self._kernels[handle.layer_id, entry["seed_id"]] = kernel

    # -- inside -----------------------------------------------------------------------------

    def _handle(self, layer_id: str, seed_id: int) -> KasminaLayer:
        handle = self.layers.get(layer_id)
        if handle is None or not 0 <= seed_id < handle.num_seeds:
            raise ContractError(f"there is no seed {layer_id}:{seed_id}")
        return handle

    def _plan(self, handle: KasminaLayer, seed_id: int, to: SeedStage, reason: TransitionReason) -> Transition:
        stage = self.state.stage_of(handle.index, seed_id)
        if not is_allowed(stage, to):
            raise ContractError(f"seed {handle.layer_id}:{seed_id} is {stage} and cannot become {to}")
        kernel = self._kernels.get((handle.layer_id, seed_id))
        return Transition(
            handle.layer_id,
            seed_id,
            stage,
            to,
            reason,
            kernel.blueprint_id if kernel else None,
            kernel.kernel_sha256 if kernel else None,
            kernel.num_parameters if kernel else 0,
        )

    def _install(self, handle: KasminaLayer, seed_id: int, kernel: LoadedKernel, optimizer: Optimizer | None) -> None:
        seed = handle.wake(seed_id, kernel)
        self._kernels[handle.layer_id, seed_id] = kernel
        if optimizer is not None:
            prefix = f"kasmina.{handle.layer_id}.{seed_id}."
            named = ((prefix + name, p) for name, p in seed.module.named_parameters())
            optimizers.join(optimizer, handle.module, named)

    def _follow_state(self, handle: KasminaLayer, seed_id: int, step: int | None) -> None:
        at = handle.index, seed_id
        stage = self.state.stage_of(*at)
        if step is not None:
            since = step - int(self.state.since_step[at])
            length = self.schedule.grafting * self.boundary_steps
            alphas = {SeedStage.GRAFTING: min(1.0, since / max(1, length))}
            is_whole = stage in (SeedStage.STABILIZING, SeedStage.EVALUATING, SeedStage.FOSSILIZED)
            self.state.alpha[at] = alphas.get(stage, 1.0 if is_whole else 0.0)
        seed = handle.awake.get(seed_id)
        if seed is not None:
            seed.stage, seed.alpha = stage, float(self.state.alpha[at])

    def _has_failed(self, handle: KasminaLayer, seed_id: int) -> bool:
        seed = handle.awake.get(seed_id)
        return seed is not None and seed.stage in ACTIVE_STAGES and seed.num_failures >= FAILURES_TO_OPEN

    def _grown(self) -> Iterator[tuple[tuple[str, int], nn.Module]]:
        layers = self.__dict__.get("layers", {})
        for key in self.__dict__.get("_kernels", {}):
            seed = layers[key[0]].awake.get(key[1])
            if seed is not None:
                yield key, seed.module


def _reason_of(stage: SeedStage) -> TransitionReason:
    if stage in EMBARGO_STAGES:
        return TransitionReason.EMBARGO_OVER
    is_timeout = stage is SeedStage.EVALUATING
    return TransitionReason.EVALUATION_TIMEOUT if is_timeout else TransitionReason.SCHEDULE


def _unpack(entry: Mapping[str, Any]) -> LoadedKernel:
    data = bytes(entry["packed"].numpy().tobytes())
    kernel = load_kernel(data, hashlib.sha256(data).hexdigest())
    return replace(kernel, kernel_sha256=entry["kernel_sha256"])
