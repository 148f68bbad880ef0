"""torch.compile: a dormant model is one graph, waking takes effect, nothing else compiles again."""

import math

import pytest
import torch
from support.models.growing_model import BOUNDARY_STEPS, batch, germinate, loss_of, plain, wrapped
from torch import Tensor, nn

from esper.kasmina.model import MorphableModel
from esper.schemas.enums import BreakerState, SeedStage

S = SeedStage


class CountingBackend:
    """Runs what dynamo gives it, as it is, and counts how often that is."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        self.num_graphs += 1
        return graph


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def compiled() -> tuple[MorphableModel, nn.Module, CountingBackend]:
    model, backend = wrapped(), CountingBackend()
    return model, torch.compile(model, fullgraph=True, backend=backend), backend


def lives(
    model: MorphableModel, call: nn.Module, backend: CountingBackend | None = None
) -> list[tuple[str, float, Tensor, int]]:
    """Stage, alpha, loss and graphs so far of each step of a run with one seed in each of two layers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    story = []
    for step in range(1, 23):
        boundary = step // BOUNDARY_STEPS
        if step == 4:
            germinate(model, "conv", module="residual", optimizer=optimizer, step=step)
            germinate(model, "fc1", module="bottleneck", optimizer=optimizer, step=step)
        optimizer.zero_grad()
        loss = loss_of(call, step)
        loss.backward()
        optimizer.step()
        seed = model.seed("fc1", 0)
        story.append((seed.stage, seed.alpha, loss.detach(), backend.num_graphs if backend else 0))
        model.on_step(step)
        if step % BOUNDARY_STEPS == 0:
            for plan in model.plan_advance(boundary):
                model.apply_transition(plan, step=step, boundary=boundary, optimizer=optimizer)
    return story


def test_only_transitions_compile_and_they_take_effect() -> None:
    model, call, backend = compiled()
    story = lives(model, call, backend)
    eager = wrapped()
    for (stage, alpha, loss, _n), (same_stage, same_alpha, same_loss, _m) in zip(
        story, lives(eager, eager), strict=True
    ):
        assert (stage, alpha) == (same_stage, same_alpha)
        assert torch.allclose(loss, same_loss, rtol=1e-4), f"{stage} {alpha}"
    graphs = {stage: [n for other, _a, _l, n in story if other == stage] for stage, _a, _l, _n in story}
    assert len({alpha for stage, alpha, _l, _n in story if stage is S.GRAFTING}) > 2, "alpha moved"
    assert set(graphs[S.DORMANT]) == set(graphs[S.GERMINATED]) == {1}, "until it takes part a seed costs nothing"
    assert set(graphs[S.TRAINING]) == {2}
    assert set(graphs[S.GRAFTING]) == set(graphs[S.STABILIZING]) == set(graphs[S.EVALUATING]) == {3}
    assert all(seed.has_run for seed in model.awake.values())


def test_a_dormant_compiled_model_is_the_plain_compiled_one_to_the_bit() -> None:
    _model, call, _backend = compiled()
    theirs = torch.compile(plain(), fullgraph=True, backend=CountingBackend())
    for n in range(3):
        assert torch.equal(loss_of(call, n), loss_of(theirs, n))


@pytest.mark.parametrize("stage", [S.TRAINING, S.EVALUATING])
def test_a_compiled_seed_that_is_not_finite_leaves_the_step_to_its_host(stage: SeedStage) -> None:
    model, call, backend = compiled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    germinate(model, "fc1", module="bottleneck", optimizer=optimizer)
    step = 0
    while model.seed("fc1", 0).stage is not stage:
        step += 2
        loss_of(call, step).backward()
        for moment in (step, step + 1):
            model.on_step(moment)
        for plan in model.plan_advance(step // 2):
            model.apply_transition(plan, step=step, boundary=step // 2, optimizer=optimizer)
    host = plain()
    with torch.no_grad():
        model.awake["fc1", 0].module[2].weight.fill_(math.nan)
    x, _y = batch(step)
    host.load_state_dict(model.state_dict())
    assert torch.equal(call(x), torch.compile(host, backend=CountingBackend())(x))
    model.zero_grad()
    loss_of(call, step).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.isfinite(norm)
    model.on_step(step + 1)
    assert model.awake["fc1", 0].breaker.state is BreakerState.OPEN
    before = backend.num_graphs
    assert torch.equal(loss_of(call, 0), loss_of(host, 0))
    assert torch.equal(loss_of(call, 1), loss_of(host, 1))
    assert backend.num_graphs <= before + 1, "an open breaker is one transition more"
