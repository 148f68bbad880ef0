"""Seeds that fail at random: every step completes, and equals the host's step if no seed takes part."""

import random
import time
from collections import Counter

import pytest
import torch
from support.faults.seed_faults import FAULTS, SometimesFaulty
from support.models.growing_model import BOUNDARY_STEPS, germinate, plain, train_step, wrapped
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.kasmina.breaker import Breaker
from esper.kasmina.model import MorphableModel
from esper.schemas.enums import SeedStage

FAULT_RATE = 0.15  # of the calls of a seed
STEP_S = 2.0  # by which the breakers' clock advances per step
TIME_LIMIT_S = 0.03


class Storm:
    """A model whose seeds germinate at random and fail at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.now_s = rng, 0.0
        self.model: MorphableModel = wrapped()
        self.optimizer: Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self.twin = plain()
        self.faults: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()
        self.breakers: Counter[str] = Counter()

    def step(self, n: int) -> bool:
        """Train one step. Returns whether it was compared with the host alone."""
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        given = {key: seed.module.num_given for key, seed in self.model.awake.items()}
        loss = train_step(self.model, self.optimizer, n)
        is_alone = all(s.is_isolated or s.module.num_given == given[k] for k, s in self.model.awake.items())
        if is_alone:
            self.twin.load_state_dict(before)
            x_loss, gradients = host_step(self.twin, n)
            assert torch.equal(loss, x_loss)
            for (name, p), expected in zip(self.model.host.named_parameters(), gradients, strict=True):
                assert torch.equal(p.grad, expected), name
        assert all(torch.isfinite(p).all() for p in self.model.parameters())
        self.model.on_step(n)
        self.now_s += STEP_S
        if n % BOUNDARY_STEPS == 0:
            self.boundary(n)
        return is_alone

    def boundary(self, n: int) -> None:
        boundary = n // BOUNDARY_STEPS
        for change in self.model.breaker_changes():
            self.breakers[change.to_state] += 1
            self.model.report_breaker(change)
        for plan in self.model.plan_advance(boundary):
            self.moves[f"{plan.to_stage} ({plan.reason})"] += 1
            self.model.apply_transition(plan, step=n, boundary=boundary, optimizer=self.optimizer)
        for layer_id, handle in self.model.layers.items():
            for seed_id in range(handle.num_seeds):
                stage = self.model.seed(layer_id, seed_id).stage
                if stage is SeedStage.DORMANT and self.rng.random() < 0.02:
                    germinate(self.model, layer_id, seed_id, optimizer=self.optimizer, step=n)
                    seed = self.model.awake[layer_id, seed_id]
                    seed.breaker, seed.time_limit_s = Breaker(lambda: self.now_s), TIME_LIMIT_S
                    seed.module = SometimesFaulty(seed.module, self.rng, FAULT_RATE, self.faults)


def host_step(host: nn.Module, n: int) -> tuple[Tensor, list[Tensor]]:
    host.zero_grad()
    x_loss = train_step(host, torch.optim.SGD(host.parameters(), lr=0.0), n)
    return x_loss, [p.grad.clone() for p in host.parameters()]


@pytest.mark.timeout(1800)
def test_steps_complete_when_seeds_fail(request: pytest.FixtureRequest) -> None:
    num_steps, seed = request.config.getoption("--fault-steps"), request.config.getoption("--fault-seed")
    storm, num_alone, began = Storm(random.Random(seed)), 0, time.monotonic()
    for n in range(1, num_steps + 1):
        num_alone += storm.step(n)
    duration_s = time.monotonic() - began
    print(
        f"\n{num_steps:,} steps, seed {seed}, {duration_s:.0f} s: all completed, {sum(storm.faults.values()):,} faults"
    )
    print(f"compared with the host alone, loss and gradients bit by bit: {num_alone:,} steps")
    for title, counts in (("fault", storm.faults), ("move", storm.moves), ("breaker", storm.breakers)):
        for name, count in counts.most_common():
            print(f"  {title:<8} {name:<40}{count:>7,}")
    assert num_alone > 0
    assert num_steps < 2000 or set(storm.faults) == set(FAULTS)
