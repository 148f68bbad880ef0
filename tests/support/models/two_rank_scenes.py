"""Scenarios for two ranks on gloo: the test is rank 0, this script is rank 1.

Usage: ``two_rank_scenes.py STORE OUT``.
"""

import math
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.models.growing_model import loaded_kernel, plain, wrapped
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esper.errors import ContractError, InvariantError
from esper.kasmina.distributed import Move, Replicas, morphable_of, ranks_of
from esper.kasmina.ema import GrowingAverage
from esper.kasmina.lifecycle import Transition
from esper.kasmina.model import MorphableModel
from esper.schemas.enums import BreakerState, SeedStage

NUM_RANKS = 2
PATIENCE = timedelta(seconds=60)
LAST_STEP = 24
GERMINATE_STEP, FOSSILIZE_STEPS, CULL_STEP = 2, (14, 16), 18


def wanted(model: MorphableModel, step: int) -> list[tuple[Transition, Any]]:
    """Commands that germinate two seeds, fossilize one and cull the other."""
    found: list[tuple[Transition, Any]] = []
    if step == GERMINATE_STEP:
        for layer_id, module in (("fc1", "bottleneck"), ("conv", "low_rank")):
            handle = model.layers[layer_id]
            kernel = loaded_kernel(handle.kind, handle.num_features, module)
            found.append((model.plan_germinate(layer_id, 1, kernel), kernel))
    if step in FOSSILIZE_STEPS and model.seed("fc1", 1).stage is SeedStage.EVALUATING:
        found.append((model.plan_fossilize("fc1", 1), None))
    if step == CULL_STEP:
        found.append((model.plan_cull("conv", 1), None))
    return found


def move(model: MorphableModel, optimizer: torch.optim.Optimizer, step: int) -> list[Move]:
    """Apply commands and transitions at a boundary, on rank 0 or on a single process."""
    boundary, moves = step // 2, []
    for plan, kernel in wanted(model, step):
        model.apply_transition(plan, step=step, boundary=boundary, kernel=kernel, optimizer=optimizer)
        moves.append(Move(plan, kernel))
    for plan in model.plan_advance(boundary):
        model.apply_transition(plan, step=step, boundary=boundary, optimizer=optimizer)
        moves.append(Move(plan))
    return moves


def pass_boundary(replicas: Replicas, optimizer: torch.optim.Optimizer, step: int) -> None:
    replicas.share_breakers()
    if replicas.rank == 0:
        replicas.share_moves(step, move(replicas.model, optimizer, step))
    else:
        replicas.take_moves(step, step // 2, optimizer)


def batch(step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def loss_of(model: nn.Module, step: int, part: int, rank: int | None) -> torch.Tensor:
    """Loss over this rank's half of a batch, or over the whole batch."""
    x, y = batch(step, part)
    if rank is not None:
        x, y = x[rank::NUM_RANKS], y[rank::NUM_RANKS]
    return nn.functional.cross_entropy(model(x), y) / 2


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    grown = morphable_of(model)
    named = {**dict(grown.host.named_parameters()), **dict(grown.named_seed_parameters())}
    return {name: p.detach().clone() for name, p in named.items()}


def life(rank: int, **how: Any) -> dict[str, Any]:
    """The lifecycle of a seed with accumulated and clipped gradients, on two ranks or on one with whole batches."""
    model = wrapped()
    replica = DistributedDataParallel(model, **how)
    replicas, optimizer = Replicas(replica), optimizer_of(replica)
    alone = wrapped()
    alone_optimizer = optimizer_of(alone)
    gradients_differ = 0
    for step in range(1, LAST_STEP + 1):
        with replica.no_sync():
            loss_of(replica, step, 0, rank).backward()
        loss_of(replica, step, 1, rank).backward()
        gradients_differ += not alike_on_all([p.grad for p in model.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        model.on_step(step)
        for part in (0, 1):
            loss_of(alone, step, part, None).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        alone_optimizer.step()
        alone_optimizer.zero_grad()
        alone.on_step(step)
        if step % 2 == 0:
            pass_boundary(replicas, optimizer, step)
            move(alone, alone_optimizer, step)
    return {
        "gradients_differ": gradients_differ,
        "weights": weights(replica),
        "alone": weights(alone),
        "stages": [(s.layer_id, s.seed_id, str(s.stage)) for s in model.seeds_not_dormant()],
        "hooks": num_hooks(model),
    }


def alike_on_all(tensors: list[torch.Tensor]) -> bool:
    mine = torch.cat([t.reshape(-1) for t in tensors])
    found = [torch.empty_like(mine) for _n in range(NUM_RANKS)]
    dist.all_gather(found, mine)
    return torch.equal(found[0], found[1])


def num_hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def static_life(rank: int) -> dict[str, Any]:
    """The same with static_graph, which does not support no_sync: one backward pass per step."""
    replica = DistributedDataParallel(wrapped(), static_graph=True)
    replicas, optimizer = Replicas(replica), optimizer_of(replica)
    for step in range(1, LAST_STEP + 1):
        optimizer.zero_grad()
        loss_of(replica, step, 0, rank).backward()
        optimizer.step()
        replicas.model.on_step(step)
        if step % 2 == 0:
            pass_boundary(replicas, optimizer, step)
    return {"weights": weights(replica)}


def dormant(rank: int) -> dict[str, Any]:
    replica = DistributedDataParallel(wrapped())
    replicas = Replicas(replica)
    replicas.follow_growth()
    return {"hooks": num_hooks(replicas.model)}


def sick_on_one(rank: int) -> dict[str, Any]:
    """The seed of one rank returns non-finite values; its breaker then opens on both ranks."""
    replica = DistributedDataParallel(wrapped())
    replicas, optimizer = Replicas(replica), optimizer_of(replica)
    model = replicas.model
    for step in range(1, 13):
        optimizer.zero_grad()
        loss_of(replica, step, 0, rank).backward()
        optimizer.step()
        model.on_step(step)
        if step == 9 and rank == 1:
            seed = model.layers["fc1"].awake[1]
            seed.module.register_forward_hook(lambda _m, _x, s: s * math.nan)
        if step % 2 == 0:
            pass_boundary(replicas, optimizer, step)
    seeds = {layer_id: model.layers[layer_id].awake[1] for layer_id in ("fc1", "conv")}
    return {
        "weights": weights(replica),
        "open": {layer_id: seed.breaker.state is BreakerState.OPEN for layer_id, seed in seeds.items()},
        "since": model.state.to_lists()["since_step"],
    }


def grown_before(rank: int) -> dict[str, Any]:
    """A model that has already grown is wrapped by DDP, which must not own its seeds."""
    model = wrapped()
    optimizer = optimizer_of(model)
    move(model, optimizer, GERMINATE_STEP)
    replica = DistributedDataParallel(model)
    replicas = Replicas(replica)
    replicas.follow_growth()
    average = GrowingAverage(replica)
    for step in range(3, 13):
        optimizer.zero_grad()
        loss_of(replica, step, 0, rank).backward()
        optimizer.step()
        model.on_step(step)
        if step % 2 == 0:
            pass_boundary(replicas, optimizer, step)
        average.update_parameters(replica)
    keys = [key.removeprefix("module.") for key in replica.state_dict()]
    replica.load_state_dict(replica.state_dict())
    return {"weights": weights(replica), "average": weights(average.copy), "keys": keys}


def parted(rank: int) -> dict[str, Any]:
    """Ranks at different steps, or with different seeds, raise an error."""
    found = {}
    for what in ("step", "stage"):
        replicas = Replicas(DistributedDataParallel(wrapped()))
        model, optimizer = replicas.model, optimizer_of(replicas.model)
        if what == "stage" and rank == 1:
            move(model, optimizer, GERMINATE_STEP)
        try:
            if rank == 0:
                replicas.share_moves(2, move(model, optimizer, GERMINATE_STEP))
            else:
                replicas.take_moves(2 + (what == "step"), 1, optimizer)
            found[what] = ""
        except InvariantError as error:
            found[what] = str(error)
    return found


def refused(rank: int) -> dict[str, Any]:
    found = {}
    for what, model in {"plain": wrapped(), "not wrapped": DistributedDataParallel(plain())}.items():
        try:
            ranks_of(model)
            found[what] = ""
        except ContractError as error:
            found[what] = str(error)
    return found


SCENES: dict[str, Callable[[int], dict[str, Any]]] = {
    "life": life,
    "bucket views": lambda rank: life(rank, gradient_as_bucket_view=True, find_unused_parameters=True),
    "static graph": static_life,
    "dormant": dormant,
    "sick on one": sick_on_one,
    "grown before": grown_before,
    "parted": parted,
    "refused": refused,
}


def play(rank: int, store: Path) -> dict[str, dict[str, Any]]:
    """Run all scenarios as one of two ranks, which meet at the file ``store``."""
    meeting = dist.FileStore(str(store), NUM_RANKS)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=NUM_RANKS, timeout=PATIENCE)
    try:
        return {name: scene(rank) for name, scene in SCENES.items()}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(play(1, Path(sys.argv[1])), sys.argv[2])
