"""MorphableModel: a model whose chosen layers hold seeds.

Owns the arrays of state, the handles and the schedule. Moves are planned first (planning.py)
and applied after. While all seeds are dormant it is the plain model to the bit, and its
state_dict is the plain model's at all times; what has grown is in ``seed_state``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esper.errors import ContractError
from esper.kasmina import baking, optimizers
from esper.kasmina.bypass import close_fast_paths, fast_path_owners
from esper.kasmina.cache import KernelCache
from esper.kasmina.face import HostFace, named_parameters_of
from esper.kasmina.flow import ExampleInputs
from esper.kasmina.health import HealthProbe
from esper.kasmina.kernels import LoadedKernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import WHOLE_STAGES, StageSchedule, Transition
from esper.kasmina.marks import DeviceMarks
from esper.kasmina.packing import pack_seeds, unpack_seeds
from esper.kasmina.planning import SeedPlanner, pairs
from esper.kasmina.seeds import AwakeSeed, Mark
from esper.kasmina.state import SeedArrays
from esper.kasmina.topology import Topology, topology_of
from esper.schemas.assets import LayerEdge, LayerNode, Seed
from esper.schemas.enums import BreakerState, SeedStage
from esper.schemas.lifecycle import EMBARGO_STAGES

NO_MARK = Mark()


@dataclass(frozen=True, slots=True)
class BreakerChange:
    """A circuit breaker that opened, is trying again, or closed."""

    layer_id: str
    seed_id: int
    from_state: BreakerState
    to_state: BreakerState
    num_failures: int
    detail: str


class MorphableModel(SeedPlanner, HostFace):
    """Made by ``esper.wrap``. Calls, attributes and state_dict go through to ``host``.

    Attributes:
        layers: qualified name -> handle, for each layer that holds seeds.
        skipped: qualified name -> why it holds none, for layers that were asked for in general terms.
        schedule: how long stages last; may be set before training.
        boundary_steps: steps between boundaries, which sets how fast alpha rises.
        topology: how data flows between the layers; None until somebody asks.
        kernel_cache: where the link keeps kernels; models of one process may be given the same.
    """

    def __init__(self, host: nn.Module, layers: Mapping[str, nn.Module], seeds_per_layer: int) -> None:
        super().__init__()
        self.host = host
        object.__setattr__(self, "_host", host)  # found at once, where ``host`` is looked for in three places
        self.skipped: Mapping[str, str] = {}
        self.layers: Mapping[str, KasminaLayer] = {
            name: KasminaLayer(name, n, module, seeds_per_layer) for n, (name, module) in enumerate(layers.items())
        }
        self.schedule = StageSchedule()
        self.boundary_steps = 1
        self.topology: Topology | None = None
        self.kernel_cache = KernelCache()
        self.state = SeedArrays(len(self.layers), max(h.num_seeds for h in self.layers.values()))
        self.probe = HealthProbe(self.layers.values())
        self.held: dict[tuple[str, int], LoadedKernel] = {}
        self.awake: dict[tuple[str, int], AwakeSeed] = {}
        self._fast_paths = fast_path_owners(host)
        self._marks = DeviceMarks()
        self._breakers: dict[tuple[str, int], BreakerState] = {}  # as last told
        self._is_differentiable_twice = False
        self._grad_scaler: Any = None
        self._is_made = True

    @property
    def differentiable_twice(self) -> bool:
        """Whether double backward (``create_graph=True``) goes through layers with awake seeds.

        It costs what the eager path catches: a seed that raises then breaks the step.
        """
        return self._is_differentiable_twice

    @differentiable_twice.setter
    def differentiable_twice(self, wanted: bool) -> None:
        self._is_differentiable_twice = wanted
        for handle in self.layers.values():
            handle.differentiable_twice = wanted

    @property
    def grad_scaler(self) -> Any:
        """The AMP GradScaler that scales the loss, if any: seeds in TRAINING must know. ``esper.connect`` sets it."""
        return self._grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: Any) -> None:
        self._grad_scaler = scaler
        for seed in self.awake.values():
            seed.follow_scaler(scaler)

    # -- what it is -------------------------------------------------------------------------

    def graph(self) -> tuple[tuple[LayerNode, ...], tuple[LayerEdge, ...]]:
        """Nodes and edges of the graph that Tamiyo sees."""
        nodes = tuple(
            LayerNode(
                layer_id=handle.layer_id,
                kind=handle.kind,
                num_features=handle.num_features,
                num_parameters=sum(p.numel() for p in handle.module.parameters()),
                num_seeds=handle.num_seeds,
            )
            for handle in self.layers.values()
        )
        self.topology = self.topology or self.find_topology()
        return nodes, self.topology.edges

    def find_topology(self, example_inputs: ExampleInputs | None = None) -> Topology:
        """How data flows between the layers that hold seeds.

        Raises:
            ContractError: the model does not run on ``example_inputs``.
        """
        return topology_of(self.host, {n: h.module for n, h in self.layers.items()}, example_inputs)

    def seed(self, layer_id: str, seed_id: int) -> Seed:
        """One seed as it stands.

        Raises:
            ContractError: there is no such seed.
        """
        at = self.handle(layer_id, seed_id).index, seed_id
        kernel = self.held.get((layer_id, seed_id))
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
        names = list(self.layers)
        return tuple(self.seed(names[layer], seed_id) for layer, seed_id in pairs(self.state.not_dormant()))

    @property
    def num_parameters_grown(self) -> int:
        """Parameters of all seeds that are awake or fossilized."""
        return sum(p.numel() for seed in self.awake.values() for p in seed.module.parameters())

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
        handle = self.handle(plan.layer_id, plan.seed_id)
        key = (plan.layer_id, plan.seed_id)
        if self.state.stage_of(handle.index, plan.seed_id) is not plan.from_stage:
            raise ContractError(f"seed {plan.layer_id}:{plan.seed_id} is not {plan.from_stage} any more")
        if plan.to_stage is SeedStage.GERMINATED:
            if kernel is None or kernel.kernel_sha256 != plan.kernel_sha256:
                raise ContractError("a seed germinates with the kernel that was planned")
            self.install(handle, plan.seed_id, kernel, optimizer)
        at = handle.index, plan.seed_id
        self.state.move(*at, plan.to_stage, step=step, boundary=boundary, kernel_sha256=plan.kernel_sha256)
        if plan.to_stage in EMBARGO_STAGES:
            self.uninstall(handle, plan.seed_id, optimizer)
        elif plan.to_stage is SeedStage.DORMANT:
            self.held.pop(key, None)
        elif optimizer is not None:  # it may have been made since, without this seed's parameters
            optimizers.join(optimizer, handle.module, named_parameters_of(key, self.awake[key]))
        self._set_alpha(handle, plan.seed_id, step)
        self._close_fast_paths()

    def on_step(self, step: int) -> None:
        """Between two steps: alpha of seeds that are grafted moves, breakers take in what happened."""
        if not self.awake:
            return
        marks = self._marks.read(self.awake.values())
        is_boundary = step % self.boundary_steps == 0
        for (layer_id, seed_id), seed in self.awake.items():
            handle = self.layers[layer_id]
            seed.settle(marks.get(id(seed), NO_MARK))
            if seed.breaker.state is not BreakerState.CLOSED:  # its time stands still
                self.state.delay(handle.index, seed_id, boundaries=int(is_boundary))
            elif seed.stage is SeedStage.GRAFTING:
                self._set_alpha(handle, seed_id, step)

    def breaker_changes(self) -> list[BreakerChange]:
        """Breakers that stand otherwise than was told (see ``report_breaker``), in joining order."""
        return [
            BreakerChange(*key, told, seed.breaker.state, seed.breaker.num_failures, seed.breaker.detail)
            for key, seed in self.awake.items()
            if seed.breaker.state is not (told := self._breakers.get(key, BreakerState.CLOSED))
        ]

    def report_breaker(self, change: BreakerChange) -> None:
        """A change is in the log: it is not a change any more."""
        self._breakers[change.layer_id, change.seed_id] = change.to_state

    # -- checkpoints ------------------------------------------------------------------------

    def seed_state(self) -> dict[str, Any]:
        """All that has grown and where every seed stands; loads with ``weights_only=True``."""
        return pack_seeds(self)

    def load_seed_state(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        """Grow what had grown, in the order in which it joined the optimizer; what has grown since goes.

        Call it before the optimizer's own state is loaded.

        Raises:
            ContractError: the state is of another model, or of another format; nothing has changed.
        """
        unpack_seeds(self, state, optimizer)
        self._close_fast_paths()

    # -- out of Kasmina again ---------------------------------------------------------------

    def unwrap(self, optimizer: Optimizer | None = None) -> nn.Module:
        """See ``esper.kasmina.baking.unwrap``."""
        return baking.unwrap(self, optimizer)

    def bake(self, optimizer: Optimizer | None = None) -> nn.Module:
        """See ``esper.kasmina.baking.bake``."""
        return baking.bake(self, optimizer)

    def release(self, optimizer: Optimizer | None, keep: Collection[AwakeSeed] = ()) -> nn.Module:
        """The host, with nothing of Kasmina in it: all seeds are dormant, and there are no hooks.

        Parameters of the seeds leave ``optimizer``, except those of ``keep``.
        """
        self.probe.disarm()
        for handle in self.layers.values():
            handle.let_go()
        for (layer_id, seed_id), seed in self.awake.items():
            self.layers[layer_id].sleep(seed_id)
            if optimizer is not None and not any(seed is kept for kept in keep):
                optimizers.leave(optimizer, seed.module.parameters())
        self._close_fast_paths()
        for table in (self.awake, self.held, self._breakers):
            table.clear()
        self.state = SeedArrays(len(self.layers), max(h.num_seeds for h in self.layers.values()))
        return self.host

    # -- inside -----------------------------------------------------------------------------

    def install(
        self, handle: KasminaLayer, seed_id: int, kernel: LoadedKernel, optimizer: Optimizer | None
    ) -> AwakeSeed:
        """Put a kernel into a seed, whatever its stage; its parameters join ``optimizer``.

        Raises:
            KernelError, NotSupportedError: the optimizer does not take them; nothing has changed.
        """
        key = handle.layer_id, seed_id
        if optimizer is not None:
            optimizers.verify_can_join(optimizer, handle.module, kernel.weights)
        seed = self.awake[key] = handle.wake(seed_id, kernel)
        seed.follow_scaler(self._grad_scaler)
        self.held[key] = kernel
        if optimizer is not None:
            optimizers.join(optimizer, handle.module, named_parameters_of(key, seed))
        return seed

    def join_awake(self, optimizer: Optimizer) -> None:
        """Let the parameters of all awake seeds join an optimizer that was made without them."""
        for key, seed in self.awake.items():
            optimizers.join(optimizer, self.layers[key[0]].module, named_parameters_of(key, seed))

    def uninstall(self, handle: KasminaLayer, seed_id: int, optimizer: Optimizer | None) -> None:
        """Take a seed's module out; its parameters leave ``optimizer``."""
        key = handle.layer_id, seed_id
        gone = handle.sleep(seed_id)
        del self.awake[key]
        self._breakers.pop(key, None)
        if optimizer is not None:
            optimizers.leave(optimizer, gone.module.parameters())

    def follow_state(self, handle: KasminaLayer, seed_id: int) -> None:
        """Let an awake seed take part as the arrays say."""
        if seed_id in handle.awake:
            at = handle.index, seed_id
            handle.follow(seed_id, self.state.stage_of(*at), float(self.state.alpha[at]))

    def follow_all(self) -> None:
        """Let all awake seeds take part as the arrays say."""
        for layer_id, seed_id in self.awake:
            self.follow_state(self.layers[layer_id], seed_id)
        self._close_fast_paths()

    def _close_fast_paths(self) -> None:
        if self._fast_paths:
            close_fast_paths(self._fast_paths, [h.module for h in self.layers.values() if h.takes_part])

    def _set_alpha(self, handle: KasminaLayer, seed_id: int, step: int) -> None:
        at = handle.index, seed_id
        stage = self.state.stage_of(*at)
        alpha = float(stage in WHOLE_STAGES)
        if stage is SeedStage.GRAFTING:
            length = self.schedule.grafting * self.boundary_steps
            alpha = self.schedule.alpha.at((step - int(self.state.since_step[at])) / max(1, length))
        self.state.set_alpha(*at, alpha)
        self.follow_state(handle, seed_id)
