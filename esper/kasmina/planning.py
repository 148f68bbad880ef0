"""Plans: what may happen to a model's seeds next. A plan has no effect; ``MorphableModel`` carries it out.

Owns the rules: which move is allowed, what the schedule moves at a boundary, who is given up.
"""

from collections.abc import Mapping

from esper.errors import ContractError, KernelError
from esper.kasmina.kernels import LoadedKernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import NEXT_BY_SCHEDULE, StageSchedule, Transition
from esper.kasmina.seeds import AwakeSeed
from esper.kasmina.state import SeedArrays, SeedIndices
from esper.schemas.enums import BreakerState, SeedStage, TransitionReason
from esper.schemas.lifecycle import ACTIVE_STAGES, EMBARGO_STAGES, given_up_stage, is_allowed

SILENT = "its layer's forward never ran while it was training: what holds the layer reads its weight directly"


class SeedPlanner:
    """The part of a MorphableModel that plans.

    Attributes:
        layers: qualified name -> handle, for each layer that holds seeds.
        schedule: how long stages last.
        state: where every seed stands.
        held: the kernels of seeds that hold one, in joining order.
        awake: the seeds that hold a module, likewise.
    """

    layers: Mapping[str, KasminaLayer]
    schedule: StageSchedule
    state: SeedArrays
    held: dict[tuple[str, int], LoadedKernel]
    awake: dict[tuple[str, int], AwakeSeed]

    def plan_germinate(self, layer_id: str, seed_id: int, kernel: LoadedKernel) -> Transition:
        """A dormant seed gets a kernel.

        Raises:
            ContractError: no such seed, or it is not dormant.
            KernelError: the kernel is of another kind or width.
        """
        handle = self.handle(layer_id, seed_id)
        verify_fits(kernel, handle)
        plan = self._plan(handle, seed_id, SeedStage.GERMINATED, TransitionReason.COMMAND, kernel=kernel)
        self.state.kernels.add(kernel.kernel_sha256)  # refused here, before anybody is told of the plan
        return plan

    def plan_cull(self, layer_id: str, seed_id: int) -> Transition:
        """A seed under way is given up: cancelled before grafting, culled after.

        Raises:
            ContractError: no such seed, or it is not under way.
        """
        handle = self.handle(layer_id, seed_id)
        stage = self.state.stage_of(handle.index, seed_id)
        if stage not in ACTIVE_STAGES:
            raise ContractError(f"seed {layer_id}:{seed_id} is {stage}: nothing to give up")
        return self._plan(handle, seed_id, given_up_stage(stage), TransitionReason.COMMAND)

    def plan_fossilize(self, layer_id: str, seed_id: int) -> Transition:
        """A seed that is being evaluated becomes permanent.

        Raises:
            ContractError: no such seed, or it is not being evaluated.
        """
        handle = self.handle(layer_id, seed_id)
        return self._plan(handle, seed_id, SeedStage.FOSSILIZED, TransitionReason.COMMAND)

    def plan_advance(self, boundary: int) -> list[Transition]:
        """What the schedule moves at this boundary, and failed seeds that are given up; by layer and seed.

        A seed whose breaker is not closed stays where it is until that is settled.
        """
        handles = list(self.layers.values())
        due = set(pairs(self.state.due(boundary, self.schedule)))
        due |= {(self.layers[key[0]].index, key[1]) for key, seed in self.awake.items() if seed.breaker.should_give_up}
        plans = (self._advance(handles[layer], seed_id) for layer, seed_id in sorted(due))
        return [plan for plan in plans if plan is not None]

    def handle(self, layer_id: str, seed_id: int) -> KasminaLayer:
        """The handle of a seed's layer.

        Raises:
            ContractError: there is no such seed.
        """
        handle = self.layers.get(layer_id)
        if handle is None or not 0 <= seed_id < handle.num_seeds:
            raise ContractError(f"there is no seed {layer_id}:{seed_id}")
        return handle

    def _advance(self, handle: KasminaLayer, seed_id: int) -> Transition | None:
        stage = self.state.stage_of(handle.index, seed_id)
        seed = handle.awake.get(seed_id)
        if seed is not None and stage in ACTIVE_STAGES and seed.breaker.should_give_up:
            detail = f"failed its trial too: {seed.breaker.detail}"
            return self._plan(handle, seed_id, given_up_stage(stage), TransitionReason.FAILURE, detail=detail)
        if stage not in NEXT_BY_SCHEDULE or (seed is not None and seed.breaker.state is not BreakerState.CLOSED):
            return None
        if stage is SeedStage.TRAINING and seed is not None and not seed.has_run:
            return self._plan(handle, seed_id, given_up_stage(stage), TransitionReason.FAILURE, detail=SILENT)
        to, _field = NEXT_BY_SCHEDULE[stage]
        return self._plan(handle, seed_id, to, _reason_of(stage))

    def _plan(
        self,
        handle: KasminaLayer,
        seed_id: int,
        to: SeedStage,
        reason: TransitionReason,
        *,
        kernel: LoadedKernel | None = None,
        detail: str = "",
    ) -> Transition:
        stage = self.state.stage_of(handle.index, seed_id)
        if not is_allowed(stage, to):
            raise ContractError(f"seed {handle.layer_id}:{seed_id} is {stage} and cannot become {to}")
        kernel = kernel or self.held.get((handle.layer_id, seed_id))
        return Transition(
            handle.layer_id,
            seed_id,
            stage,
            to,
            reason,
            kernel.blueprint_id if kernel else None,
            kernel.kernel_sha256 if kernel else None,
            kernel.num_parameters if kernel else 0,
            detail,
        )


def verify_fits(kernel: LoadedKernel, handle: KasminaLayer) -> None:
    """See that a kernel is for layers of this kind and width.

    Raises:
        KernelError: it is not.
    """
    if (kernel.kind, kernel.num_features) != (handle.kind, handle.num_features):
        raise KernelError(
            f"kernel {kernel.kernel_sha256[:12]} is for {kernel.kind} layers of {kernel.num_features} "
            f"features; {handle.layer_id} is {handle.kind} of {handle.num_features}"
        )


def pairs(at: SeedIndices) -> list[tuple[int, int]]:
    """Layer and seed, one after the other, of what the arrays are indexed with."""
    layers, seeds = at
    return list(zip(layers.tolist(), seeds.tolist(), strict=True))


def _reason_of(stage: SeedStage) -> TransitionReason:
    if stage in EMBARGO_STAGES:
        return TransitionReason.EMBARGO_OVER
    is_timeout = stage is SeedStage.EVALUATING
    return TransitionReason.EVALUATION_TIMEOUT if is_timeout else TransitionReason.SCHEDULE
