"""Forks without a bus: the counterfactual branch equals a run that decided otherwise, to the bit."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.growing_model import loaded_kernel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.kernels import LoadedKernel
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.services.tolaria.counterfactuals.branch_measurement import (
    ForkJob,
    measure,
    measure_packed,
    opposite_schedule,
    pack_job,
)
from esper.services.tolaria.counterfactuals.branch_trainer import (
    AppliedCommand,
    BranchTrainer,
    Snapshot,
    replay_commands,
)
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.run_costs import host_cost
from esper.services.tolaria.training.training_loop import make_model

STEPS = 10  # in an epoch
BOUNDARY = 3


def trainer_of(**changed: Any) -> TrainerSettings:
    schedule = {"germinated": 1, "training": 1, "grafting": 2, "stabilizing": 1, "evaluating": 4, "embargo": 1}
    fields = {
        "network": "mlp", "hidden": 6, "depth": 2, "batch_size": 128, "copies": 1, "epochs": 4, "threads": 1,
        "seeds_per_layer": 2, "link": {"boundary_steps": BOUNDARY}, "schedule": schedule,
    }  # fmt: skip
    return TrainerSettings.model_validate({**fields, **changed})


def kernel(module: str = "low_rank") -> LoadedKernel:
    return loaded_kernel(LayerKind.LINEAR, 6, module)


def germinate(step: int, seed_id: int = 0, module: str = "low_rank", layer_id: str = "hidden.1") -> AppliedCommand:
    return AppliedCommand(step, Action.GERMINATE, layer_id, seed_id, kernel(module))


def forked(
    trainer: TrainerSettings, commands: list[AppliedCommand], decided: AppliedCommand, end_of_epoch: int
) -> ForkJob:
    """Train a run that applies ``commands``, and fork it where it applied ``decided``."""
    run, snapshots = BranchTrainer(trainer), list[Snapshot]()

    def schedule(branch: BranchTrainer) -> Iterable[AppliedCommand]:
        if branch.step == decided.step:
            snapshots.append(branch.snapshot())
        return replay_commands(commands)(branch)

    value = run.train(end_of_epoch, schedule)
    later = [c for c in commands if c.step >= decided.step]
    return ForkJob(snapshots[0], decided, decided.kernel or kernel(), end_of_epoch, later, value, run.step)


def state_of(branch: BranchTrainer) -> dict[str, Any]:
    """Weights, seeds, optimizer and random state of a branch."""
    return dict(branch.snapshot())


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{n}]")
    else:
        assert a == b, where


OTHERS = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from(["low_rank", "bottleneck", "noop"]), st.sampled_from([0, 1])),
    max_size=3,
)


@settings(max_examples=6, deadline=None)
@given(
    at=st.integers(1, 9), others=OTHERS, optimizer=st.sampled_from(["sgd", "adamw"]), module=st.sampled_from(["low_rank", "mlp"])
)  # fmt: skip
def test_branch_equals_a_run_that_never_germinated(
    at: int, others: list[tuple[int, str, int]], optimizer: str, module: str
) -> None:
    trainer = trainer_of(optimizer=optimizer, learning_rate=0.02)
    decided = germinate(BOUNDARY * at, module=module)
    first = {seed_id: (number, name) for number, name, seed_id in reversed(others)}  # a seed germinates once
    rest = [germinate(BOUNDARY * n, seed_id, name, "hidden.0") for seed_id, (n, name) in first.items()]
    commands = sorted([decided, *rest], key=lambda c: c.step)
    job = forked(trainer, commands, decided, 3)

    again = BranchTrainer.from_snapshot(trainer, job.snapshot)
    assert again.train(3, replay_commands(job.commands)) == job.run_metric
    without = BranchTrainer.from_snapshot(trainer, job.snapshot)
    without.train(3, opposite_schedule(job))
    never, whole = BranchTrainer(trainer), BranchTrainer(trainer)
    never.train(3, replay_commands(rest))
    whole.train(3, replay_commands(commands))
    assert_same(state_of(without), state_of(never))
    assert_same(state_of(again), state_of(whole))
    assert never.metrics[3] == without.metrics[3]


@settings(max_examples=6, deadline=None)
@given(at=st.integers(1, 9), layer_id=st.sampled_from(["hidden.0", "hidden.1"]))
def test_placebo_effect_is_zero_on_the_same_batches(at: int, layer_id: str) -> None:
    trainer = trainer_of()
    decided = germinate(BOUNDARY * at, module="noop", layer_id=layer_id)
    job = forked(trainer, [decided], decided, 3)
    without = BranchTrainer.from_snapshot(trainer, job.snapshot)
    assert without.train(3, opposite_schedule(job)) - job.run_metric == 0.0
    grown = BranchTrainer.from_snapshot(trainer, job.snapshot)
    grown.train(3, replay_commands(job.commands))
    assert_same(state_of(grown)["model"], state_of(without)["model"])
    assert grown.moves != without.moves


def test_placebo_is_compared_on_other_batches() -> None:
    trainer = trainer_of(fork={"num_batch_orders": 3})
    placebo, real = germinate(6, module="noop"), germinate(6, module="mlp")
    measured = {c.kernel.spec.module: measure(trainer, forked(trainer, [c], c, 3)) for c in (placebo, real) if c.kernel}
    assert measured["noop"].fork.is_placebo
    assert measured["noop"].after != measured["noop"].before
    assert not measured["mlp"].fork.is_placebo
    for found in measured.values():
        assert (found.fork.num_draws, found.fork.horizon_steps) == (3, 4 * STEPS - 6)
        assert found.fork.variance is not None
    assert measure(trainer_of(), forked(trainer_of(), [real], real, 3)).fork.variance is None


def test_variance_is_that_of_the_mean_of_the_draws() -> None:
    trainer = trainer_of(fork={"num_batch_orders": 4})
    decided = germinate(6, module="mlp")
    job = forked(trainer, [decided], decided, 2)
    measured = measure(trainer, job)
    differences = []
    for draw in range(4):
        values = [
            BranchTrainer.from_snapshot(trainer, job.snapshot, draw=draw).train(2, schedule)
            for schedule in (replay_commands(job.commands), opposite_schedule(job))
        ]
        differences.append(values[0] - values[1])
    drawn = torch.tensor(differences, dtype=torch.float64)
    assert measured.after - measured.before == pytest.approx(float(drawn.mean()))
    assert measured.fork.variance == pytest.approx(float(drawn.var() / 4))
    assert len(set(differences)) > 1, "each draw has other batches"


def test_verdicts_are_compared_with_their_opposites() -> None:
    trainer = trainer_of(epochs=6)
    begun = germinate(3, module="mlp")
    for action, other in ((Action.CULL, SeedStage.FOSSILIZED), (Action.FOSSILIZE, SeedStage.CULLED)):
        decided = AppliedCommand(21, action, *begun.seed)  # it came to EVALUATING at step 18
        job = forked(trainer, [begun, decided], decided, 5)
        branch = BranchTrainer.from_snapshot(trainer, job.snapshot)
        value = branch.train(5, opposite_schedule(job))
        assert (21, other) in [(step, move.to_stage) for step, move in branch.moves]
        measured = measure(trainer, job)
        own, opposite = ("before", "after") if action is Action.CULL else ("after", "before")
        assert (getattr(measured, own), getattr(measured, opposite)) == (job.run_metric, value)


def test_early_cull_is_compared_with_a_permanent_seed() -> None:
    trainer = trainer_of(epochs=6)
    begun = germinate(3, module="mlp")
    decided = AppliedCommand(9, Action.CULL, *begun.seed)
    branch_job = forked(trainer, [begun, decided], decided, 5)
    branch = BranchTrainer.from_snapshot(trainer, branch_job.snapshot)
    branch.train(5, opposite_schedule(branch_job))
    assert branch.model.seed(*begun.seed).stage is SeedStage.FOSSILIZED


def test_packed_job_gives_the_same_result() -> None:
    trainer = trainer_of()
    decided = germinate(6, module="mlp")
    job = forked(trainer, [decided, germinate(9, 1, layer_id="hidden.0")], decided, 2)
    assert measure_packed(trainer, pack_job(job)) == measure(trainer, copy.copy(job))


@pytest.mark.parametrize("network", ["digits", "mlp", "cnn"])
@pytest.mark.parametrize("module", ["low_rank", "bottleneck", "mlp", "noop"])
def test_flops_equal_those_that_torch_counts(network: str, module: str) -> None:
    trainer = trainer_of(network=network, channels=4)
    model = make_model(trainer, (1, 8))
    layer_id, handle = list(model.layers.items())[-2]
    loaded = loaded_kernel(handle.kind, handle.num_features, module)
    host = host_cost(trainer)
    assert host.num_parameters == sum(p.numel() for p in model.host.parameters())
    x = torch.zeros(1, 1, 8, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as bare:
        model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = model.plan_germinate(layer_id, 0, loaded)
    model.apply_transition(plan, step=0, boundary=0, kernel=loaded, optimizer=optimizer)
    for boundary in range(1, 5):
        for seed in model.awake.values():
            seed.has_run = True
        for move in model.plan_advance(boundary):
            model.apply_transition(move, step=BOUNDARY * boundary, boundary=boundary, optimizer=optimizer)
    model.on_step(4 * BOUNDARY + 2)
    with torch.no_grad(), FlopCounterMode(display=False) as grown:
        model(x)
    added = grown.get_total_flops() - bare.get_total_flops()
    assert (host.flops, host.flops_of(layer_id, loaded)) == (bare.get_total_flops(), added)
