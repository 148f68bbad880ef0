"""Replicas: one growing model on several ranks, all of which take the same move in the same step.

Rank 0 decides and tells; the others do what it did. Every method is a collective: all ranks call
it at the same place. What travels is JSON and bytes, never a pickle.
Invariant: after ``share_moves`` and ``take_moves`` the seeds of all ranks stand alike, or the call raises. A rank
that dies makes the others fail in torch's own way.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from esper.errors import ContractError, InvariantError
from esper.kasmina.averaging import GradientAverager
from esper.kasmina.kernels import LoadedKernel
from esper.kasmina.lifecycle import Transition
from esper.kasmina.model import MorphableModel
from esper.kasmina.packing import pack_kernel, unpack_kernel
from esper.schemas.enums import SeedStage, TransitionReason

CHUNK_BYTES = 256 * 1024 * 1024  # of one broadcast; some backends count in 32 bits

Blobs = Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Move:
    """A transition that was carried out; a seed that germinated has its kernel beside it."""

    plan: Transition
    kernel: LoadedKernel | None = None


class Replicas:
    """The ranks that train one model. ``model`` is the MorphableModel inside DDP on this one.

    Raises:
        ContractError: what DDP holds is not a MorphableModel.
    """

    def __init__(self, replica: DistributedDataParallel) -> None:
        self.model = morphable_of(replica.module)
        self.rank = dist.get_rank(replica.process_group)
        self._group = replica.process_group
        self._source = dist.get_global_rank(self._group, 0)
        self._device = next(self.model.parameters()).device
        self._averager = GradientAverager(replica, self.model)

    def follow_growth(self) -> None:
        """Average the gradients of what is awake now. Not a collective."""
        self._averager.follow_growth()

    def share_breakers(self) -> None:
        """A breaker that opened on one rank opens on all, before anything is planned from it."""
        seeds = [seed for layer in self.model.layers.values() for seed in layer.awake.values()]
        if not seeds:
            return
        stands = [[seed.breaker.take_opening(), seed.breaker.should_give_up] for seed in seeds]
        worst = torch.tensor(stands, dtype=torch.uint8, device=self._device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._group)
        for seed, (opened, gives_up) in zip(seeds, worst.tolist(), strict=True):
            if opened or gives_up:
                seed.breaker.opened_elsewhere(gives_up=bool(gives_up))

    def share_moves(self, step: int, moves: Sequence[Move]) -> None:
        """Rank 0: tell what moved at this step. The seeds have moved here already."""
        is_dormant = not moves and not self.model.seeds_not_dormant()
        message = {
            "step": step,
            "moves": [asdict(move.plan) for move in moves],
            "arrays": None if is_dormant else self.model.state.to_lists(),
        }
        self.broadcast(message, [pack_kernel(m.kernel, m.kernel.weights) for m in moves if m.kernel is not None])
        if moves:
            self.follow_growth()

    def take_moves(self, step: int, boundary: int, optimizer: Optimizer) -> list[Transition]:
        """The other ranks: do what rank 0 did at this step.

        Raises:
            InvariantError: rank 0 is at another step, or its seeds stand otherwise: the ranks have parted.
        """
        message, blobs = self.receive()
        if message["step"] != step:
            raise InvariantError(f"rank {self.rank} is at step {step}, rank 0 at {message['step']}: they have parted")
        kernels = iter(blobs)
        plans = [_plan(told) for told in message["moves"]]
        for plan in plans:
            kernel = None
            if plan.to_stage is SeedStage.GERMINATED:
                kernel = unpack_kernel(next(kernels), plan.kernel_sha256 or "")
            try:
                self.model.apply_transition(plan, step=step, boundary=boundary, kernel=kernel, optimizer=optimizer)
            except ContractError as error:
                raise InvariantError(f"rank {self.rank} cannot move as rank 0 did: {error}") from error
        if plans:
            self.follow_growth()
        if message["arrays"] is not None:
            self._stand_as(message["arrays"])
        return plans

    def _stand_as(self, arrays: Mapping[str, Any]) -> None:
        """Take over what a rank cannot know alone: how long stages last where a breaker made them wait."""
        if self.model.state.to_lists()["stage"] != arrays["stage"]:
            raise InvariantError(f"the seeds of rank {self.rank} do not stand as those of rank 0 do")
        self.model.state.load_lists(dict(arrays))
        self.model.follow_all()

    # -- messages ---------------------------------------------------------------------------

    def broadcast(self, message: Mapping[str, Any], blobs: Blobs = ()) -> None:
        """Rank 0: send JSON, and uint8 tensors beside it."""
        head = json.dumps({"message": message, "sizes": [b.numel() for b in blobs]}).encode()
        data = torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *blobs]).to(self._device)
        self._broadcast(torch.tensor([len(head), data.numel()], device=self._device))
        self._broadcast(data)

    def receive(self) -> tuple[dict[str, Any], list[Tensor]]:
        """The other ranks: what rank 0 tells, the tensors on the CPU."""
        sizes = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._broadcast(sizes)
        head_size, size = (int(n) for n in sizes.tolist())
        data = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._broadcast(data)
        data = data.cpu()
        head = json.loads(data[:head_size].numpy().tobytes())
        return head["message"], list(torch.split(data[head_size:], head["sizes"]))

    def gather(self, blob: Tensor) -> list[Tensor]:
        """One uint8 tensor from each rank, by rank; on the CPU, the same on all."""
        size = torch.tensor([blob.numel()], device=self._device)
        sizes = [torch.zeros_like(size) for _n in range(dist.get_world_size(self._group))]
        dist.all_gather(sizes, size, group=self._group)
        lengths = [int(n) for n in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self._device)
        padded[: blob.numel()] = blob.to(self._device)
        found = [torch.empty_like(padded) for _n in lengths]
        dist.all_gather(found, padded, group=self._group)
        return [f[:n].cpu() for f, n in zip(found, lengths, strict=True)]

    def _broadcast(self, data: Tensor) -> None:
        for part in torch.split(data, CHUNK_BYTES):
            dist.broadcast(part, self._source, group=self._group)


def ranks_of(model: nn.Module) -> tuple[MorphableModel, Replicas | None]:
    """The MorphableModel in what a training loop calls, and its ranks where it is one of several.

    Raises:
        ContractError: it is none, or several ranks train and the model is not the DDP module.
    """
    inner = _uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        replicas = Replicas(inner)
        return replicas.model, replicas
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ContractError(
            f"{dist.get_world_size()} ranks train, and a {type(inner).__name__} would grow on each by itself: "
            "give the DistributedDataParallel(esper.wrap(net)) model"
        )
    return morphable_of(inner), None


def morphable_of(model: nn.Module) -> MorphableModel:
    """The MorphableModel in what a training loop calls: under DDP, torch.compile, both or none.

    Raises:
        ContractError: there is none.
    """
    inner = _uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        inner = _uncompiled(inner.module)
    if not isinstance(inner, MorphableModel):
        raise ContractError(f"{type(inner).__name__} holds no seeds: esper.wrap() comes first, around the plain model")
    return inner


def _uncompiled(module: nn.Module) -> nn.Module:
    found: nn.Module = getattr(module, "_orig_mod", module)
    return found


def _plan(told: Mapping[str, Any]) -> Transition:
    enums = {
        "from_stage": SeedStage(told["from_stage"]),
        "to_stage": SeedStage(told["to_stage"]),
        "reason": TransitionReason(told["reason"]),
    }
    return Transition(**{**told, **enums})
