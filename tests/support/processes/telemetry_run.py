"""A small training run that is killed with telemetry in its memory.

Usage: ``telemetry_run.py MODE RUN FOLDER GO``. MODE is first (saves a checkpoint, then is killed), again (resumed, and
killed after a boundary) or last (resumed, runs to its end). Training starts once the file GO exists.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from support.conditions import wait_until
from torch import nn

import esper
from esper.connection.settings import LinkOptions

CHECKPOINT_STEP = 20


def main() -> None:
    mode, run_id, folder, go = sys.argv[1:]
    model = esper.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), seeds_per_layer=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = LinkOptions(boundary_steps=5, health_interval_steps=1, folder=Path(folder))
    with esper.connect(model, optimizer, run_id=run_id, options=options, is_resumed=mode != "first") as run:
        print("connected", flush=True)
        wait_until(Path(go).exists, 60, "the file that starts training")
        for _n in range(CHECKPOINT_STEP):
            optimizer.zero_grad()
            model(torch.ones(4, 6)).sum().backward()
            optimizer.step()
            run.step()
        if mode == "first":
            assert run.checkpoint()
        if mode != "last":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
