"""Comparisons of policies: runs differ in the policy alone, and costs equal what torch counts."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models.growing_model import kernel_for
from torch.utils.flop_counter import FlopCounterMode

from esper.config import Settings
from esper.kasmina.distributed import Move
from esper.schemas.enums import Action, SeedStage
from esper.services.tolaria.corpus.training_corpus import CorpusSettings, RunPlan, draw_plans
from esper.services.tolaria.counterfactuals.branch_trainer import AppliedCommand, BranchTrainer, replay_commands
from esper.services.tolaria.study.policy_study import (
    FROM_SCRATCH,
    NEVER_GROWS,
    OTHER_BATCHES,
    plans_under_policy,
    policy_results,
    train_from_scratch,
    train_never_growing,
    train_on_other_batches,
)
from esper.services.tolaria.training.run_costs import PASSES_PER_STEP, CostLedger, cost_of_steps, host_cost
from esper.services.tolaria.training.training_loop import make_model

SETTINGS = Settings()
CORPUS = CorpusSettings(seed=9, folder=Path("runs"))


def short_plans(num: int) -> list[RunPlan]:
    return [
        replace(p, trainer=p.trainer.model_copy(update={"epochs": 1}))
        for p in itertools.islice(draw_plans(CORPUS), num)
    ]


def grown_in(plan: RunPlan) -> tuple[AppliedCommand, ...]:
    model = make_model(plan.trainer, (1, 8))
    names = list(model.layers)[:2]
    return tuple(AppliedCommand(0, Action.GERMINATE, name, 0, kernel_for(model, name, "mlp")) for name in names)


def test_from_scratch_without_kernels_equals_the_host() -> None:
    (plan,) = short_plans(1)
    plain, scratch = train_never_growing(plan, SETTINGS), train_from_scratch(plan, SETTINGS)
    assert plain.results is not None
    assert scratch.results is not None
    assert scratch.results.final_accuracy == plain.results.final_accuracy
    assert scratch.cost == plain.cost
    other = train_on_other_batches(plan, SETTINGS)
    assert other.results is not None
    assert other.results.initial_accuracy == plain.results.initial_accuracy
    assert other.cost == plain.cost


def test_from_scratch_kernels_are_permanent_and_counted() -> None:
    (plan,) = short_plans(1)
    grown = grown_in(plan)
    branch = BranchTrainer(plan.trainer)
    branch.grow_from_start(grown)
    assert [branch.model.seed(*g.seed).stage for g in grown] == [SeedStage.FOSSILIZED] * 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(branch.model)(torch.zeros(1, 1, 8, 8))
    found = cost_of_steps(plan.trainer, 10, grown)
    assert found.training_flops == PASSES_PER_STEP * 10 * plan.trainer.batch_size * counter.get_total_flops()
    assert found.num_parameters == sum(p.numel() for p in branch.model.parameters())
    before = [p.detach().clone() for p in branch.model.parameters()]
    branch.train(0, replay_commands([]))
    assert all(not torch.equal(a, b) for a, b in zip(before, branch.model.parameters(), strict=True))


def test_seed_costs_from_training_until_it_is_culled() -> None:
    (plan,) = short_plans(1)
    trainer, (kept, culled) = plan.trainer, grown_in(plan)
    host = host_cost(trainer)
    ledger, branch = CostLedger(trainer, host), BranchTrainer(trainer)

    def move(command: AppliedCommand, to_stage: SeedStage) -> Move:
        assert command.kernel is not None
        germination = replace(branch.model.plan_germinate(*command.seed, command.kernel), to_stage=to_stage)
        return Move(germination, command.kernel if to_stage is SeedStage.GERMINATED else None)

    for stages in (
        (SeedStage.GERMINATED, SeedStage.GERMINATED),
        (SeedStage.TRAINING, SeedStage.TRAINING),
        (SeedStage.FOSSILIZED, SeedStage.CULLED),
    ):
        ledger.boundary_passed([move(c, s) for c, s in zip((kept, culled), stages, strict=True)])
    steps = trainer.link.boundary_steps
    found = ledger.total(3 * steps + 5)
    a, b = (host.flops_of(c.layer_id, c.kernel) for c in (kept, culled) if c.kernel)
    in_steps = (3 * steps + 5) * host.flops + (steps + 5) * a + steps * b
    assert found.training_flops == PASSES_PER_STEP * trainer.batch_size * in_steps
    assert [(g.seed, g.kernel) for g in found.grown] == [(kept.seed, kept.kernel)]
    assert found.num_parameters - found.num_parameters_host == sum(
        w.numel()
        for w in kept.kernel.weights.values()  # type: ignore[union-attr]
    )


def test_gains_are_paired_and_failed_plans_left_out() -> None:
    drawn = short_plans(7)
    base = [train_never_growing(p, SETTINGS) for p in drawn]

    def better(gain: float) -> list[object]:
        return [
            replace(one, results=one.results.model_copy(update={"final_accuracy": one.results.final_accuracy + gain}))
            for one in base
            if one.results
        ]

    failed = [replace(base[0], results=None, error="no broker"), *better(0.1)[1:]]
    rows = {
        row.name: row
        for row in policy_results({NEVER_GROWS: base, OTHER_BATCHES: better(-0.02), FROM_SCRATCH: failed})  # type: ignore[dict-item]
    }
    assert {row.num_plans for row in rows.values()} == {6}
    assert rows[NEVER_GROWS].gain.value == 0
    for name, gain in ((OTHER_BATCHES, -0.02), (FROM_SCRATCH, 0.1)):
        assert rows[name].gain.value == pytest.approx(gain)
        assert rows[name].gain.low == pytest.approx(gain)  # the same gain in every pair: no spread
    found = rows[FROM_SCRATCH].accuracy
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high


def test_policies_have_separate_runs_of_the_same_plans() -> None:
    drawn = short_plans(2)
    named = plans_under_policy("schedule", drawn, "t")
    assert [p.trainer for p in named] == [p.trainer for p in drawn]
    assert not {p.run_id for p in named} & {p.run_id for p in drawn}
    others = list(itertools.islice(draw_plans(replace(CORPUS, uses_held_out_hosts=True)), 30))
    usual = list(itertools.islice(draw_plans(CORPUS), 30))
    for field in ("hidden", "channels", "depth"):
        assert not {getattr(p.trainer, field) for p in others} & {getattr(p.trainer, field) for p in usual}
