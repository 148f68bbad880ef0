"""A small training run that a test kills and resumes.

Usage: ``resumable_run.py MODE RUN FOLDER COMMAND_ID OUT``; MODE is whole, killed or resumed.
"""

import os
import signal
import sys
import time
from pathlib import Path
from uuid import UUID

import torch
from torch import nn

import esper
from esper.connection.settings import LinkOptions
from esper.kasmina.lifecycle import StageSchedule

CHECKPOINT_STEP, COMMAND_STEP, KILL_STEP, LAST_STEP = 20, 29, 44, 70


def main() -> None:
    mode, run_id, folder, command, out = sys.argv[1:]
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    model = esper.wrap(net, seeds_per_layer=2)
    model.schedule = StageSchedule(germinated=1, training=1, grafting=2, stabilizing=1, evaluating=2, embargo=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9)
    options = LinkOptions(boundary_steps=5, health_interval_steps=2, folder=Path(folder))
    with esper.connect(
        model, optimizer, run_id=run_id, options=options, scheduler=scheduler, is_resumed=mode == "resumed"
    ) as run:
        print(f"started {run.incarnation} {run.step_number}", flush=True)
        while run.step_number < LAST_STEP:
            step = run.step_number + 1
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            if step == COMMAND_STEP:
                print("send", flush=True)
            while step == COMMAND_STEP and not run._inbox.has_seen([UUID(command)]):
                time.sleep(0.01)
            run.step()
            if step % 10 == 0:
                run.epoch_completed({"val_accuracy": step / 100})
            if step == CHECKPOINT_STEP:
                run.checkpoint()
            if step == KILL_STEP and mode == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
    torch.save({name: p.detach() for name, p in model.named_parameters()}, out)


if __name__ == "__main__":
    main()
