"""A run on two ranks that is saved half-way and resumed: the test is rank 0, this script is rank 1.

Usage: ``two_trainers.py STORE FOLDER RUN OUT``.
"""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.config import Settings
from esper.connection.run_handle import RunHandle
from esper.connection.settings import LinkOptions
from esper.kasmina.lifecycle import StageSchedule

NUM_RANKS = 2
TIMEOUT = timedelta(seconds=60)
BOUNDARY_STEPS = 5
COMMAND_STEP, CHECKPOINT_STEP, LAST_STEP = 8, 20, 45

Wait = Callable[[RunHandle], None]


def train(
    rank: int, folder: Path, run_id: str, settings: Settings | None, wait: Wait, *, is_resumed: bool
) -> dict[str, Any]:
    """Train one incarnation to the last step. Returns the state of the model and of the run."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    model = esper.wrap(net, seeds_per_layer=2)
    model.schedule = StageSchedule(germinated=1, training=1, grafting=2, stabilizing=1, evaluating=2, embargo=1)
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9)
    options = LinkOptions(boundary_steps=BOUNDARY_STEPS, health_interval_steps=2, folder=folder)
    link = esper.connect(
        replica,
        optimizer,
        run_id=run_id,
        settings=settings,
        options=options,
        scheduler=scheduler,
        is_resumed=is_resumed,
    )
    torch.manual_seed(100 + rank)  # each rank has its own random state; a checkpoint restores it
    stages = []
    with link as run:
        while run.step_number < LAST_STEP:
            generator = torch.Generator().manual_seed(NUM_RANKS * run.step_number + rank)
            x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(replica(x), y).backward()
            optimizer.step()
            scheduler.step()
            if run.step_number + 1 == COMMAND_STEP:
                wait(run)
            run.step()
            stages.append([str(seed.stage) for seed in model.seeds_not_dormant()])
            if run.step_number == CHECKPOINT_STEP and not is_resumed:
                assert run.checkpoint({"rank": rank})
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "optimizer": optimizer.state_dict(),
        "stages": stages,
        "restored": run.restored,
        "run": [run.run_id, run.incarnation, run.num_adaptations],
    }


def play(rank: int, store: Path, folder: Path, run_id: str, settings: Settings | None, wait: Wait) -> list[Any]:
    """Train the whole run, then resume it from its checkpoint, as one of two ranks."""
    rendezvous = dist.FileStore(str(store), NUM_RANKS)
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=NUM_RANKS, timeout=TIMEOUT)
    try:
        return [train(rank, folder, run_id, settings, wait, is_resumed=resumed) for resumed in (False, True)]
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    store, folder, run_id, out = sys.argv[1:]
    torch.save(play(1, Path(store), Path(folder), run_id, None, lambda _run: time.sleep(0)), out)
