"""A run that was saved and loaded goes on as the one that was never interrupted, to the bit."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.growing_model import loaded_kernel
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.connection.checkpoints.checkpoint_store import CheckpointStore
from esper.connection.checkpoints.training_state import TrainingState, load_rank_state, rank_state
from esper.errors import ContractError
from esper.kasmina.ema import GrowingAverage
from esper.kasmina.lifecycle import AlphaCurve, StageSchedule
from esper.kasmina.model import MorphableModel
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import ACTIVE_STAGES

SCHEDULE = StageSchedule(
    germinated=1, training=1, grafting=2, stabilizing=1, evaluating=2, embargo=1, alpha=AlphaCurve.COSINE
)
BOUNDARY_STEPS = 2
NUM_BOUNDARIES = 14
MODULES = ["low_rank", "bottleneck", "noop"]


def build(seed: int) -> MorphableModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    model = esper.wrap(net, seeds_per_layer=2)
    model.schedule, model.boundary_steps = SCHEDULE, BOUNDARY_STEPS
    return model


def decay_split(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if p.dim() >= 2]
    return [
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
        {"params": matrices, "lr": 0.02},
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "fused sgd": lambda m: torch.optim.SGD(decay_split(m), lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda m: torch.optim.AdamW(decay_split(m), lr=0.01, amsgrad=True),
    "foreach nadam": lambda m: torch.optim.NAdam(m.named_parameters(), lr=0.01, foreach=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05, initial_accumulator_value=0.1),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda o: None,
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=100, cycle_momentum="momentum" in o.defaults),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
}


@dataclass
class Run:
    """A training loop with everything in it; ``program`` says what is wanted at each boundary."""

    recipe: tuple[str, str, bool]
    program: list[list[tuple[str, str, int, str]]]
    seed: int = 0
    step: int = 0
    num_moves: int = field(default=0)

    def __post_init__(self) -> None:
        optimizer, scheduler, is_scaled = self.recipe
        self.model = build(self.seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) if is_scaled else None
        self.training = TrainingState(self.model, self.optimizer, self.scheduler, self.scaler)
        self.average = GrowingAverage(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        torch.manual_seed(5)

    def train(self, last_step: int) -> None:
        while self.step < last_step:
            self.step += 1
            loss = self._optimize()
            self.model.on_step(self.step)
            if self.step % BOUNDARY_STEPS == 0:
                self._pass_boundary(self.step // BOUNDARY_STEPS)
            self.average.update_parameters(self.model)
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss)
            elif self.scheduler is not None:
                self.scheduler.step()

    def _optimize(self) -> float:
        self.optimizer.zero_grad()
        losses = [self.model(torch.randn(6, 5)).square().mean() / 2 for _part in range(2)]
        if self.scaler is None:
            for loss in losses:
                loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
        else:
            for loss in losses:
                self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return float(sum(loss.detach() for loss in losses))

    def _pass_boundary(self, boundary: int) -> None:
        for action, layer_id, seed_id, module in self.program[boundary - 1]:
            stage, kernel = self.model.seed(layer_id, seed_id).stage, None
            if action == "germinate" and stage is SeedStage.DORMANT:
                handle = self.model.layers[layer_id]
                kernel = loaded_kernel(handle.kind, handle.num_features, module)
                plan = self.model.plan_germinate(layer_id, seed_id, kernel)
            elif action == "cull" and stage in ACTIVE_STAGES:
                plan = self.model.plan_cull(layer_id, seed_id)
            elif action == "fossilize" and stage is SeedStage.EVALUATING:
                plan = self.model.plan_fossilize(layer_id, seed_id)
            else:
                continue
            self._apply(plan, boundary, kernel)
        for plan in self.model.plan_advance(boundary):
            self._apply(plan, boundary, None)

    def _apply(self, plan: Any, boundary: int, kernel: Any) -> None:
        self.num_moves += 1
        self.model.apply_transition(plan, step=self.step, boundary=boundary, kernel=kernel, optimizer=self.optimizer)

    def saved(self) -> dict[str, Any]:
        file = io.BytesIO()
        own = rank_state({"average": self.average.state_dict(), "step": self.step})
        torch.save({**self.training.to_dict(), "ranks": [own]}, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, saved: dict[str, Any]) -> None:
        self.training.load_dict(saved)
        extra = load_rank_state(saved["ranks"][0])
        self.average.load_state_dict(extra["average"])
        self.step = extra["step"]


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Alike to the bit, through all nesting."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{n}]")
    else:
        assert a == b, where


ACTIONS = st.tuples(
    st.sampled_from(["germinate", "germinate", "germinate", "cull", "fossilize", "fossilize"]),
    st.sampled_from(["0", "4"]),
    st.integers(0, 1),
    st.sampled_from(MODULES),
)
PROGRAMS = st.lists(st.lists(ACTIONS, max_size=3), min_size=NUM_BOUNDARIES, max_size=NUM_BOUNDARIES)
RECIPES = st.tuples(st.sampled_from(sorted(OPTIMIZERS)), st.sampled_from(sorted(SCHEDULERS)), st.booleans())


@settings(max_examples=10, deadline=None)
@given(recipe=RECIPES, program=PROGRAMS, saved_at=st.integers(2, 2 * NUM_BOUNDARIES - 4))
def test_any_program_of_growth_resumes_to_the_bit(
    recipe: tuple[str, str, bool], program: list[list[tuple[str, str, int, str]]], saved_at: int
) -> None:
    whole = Run(recipe, program)
    whole.train(saved_at)
    saved = whole.saved()
    whole.train(2 * NUM_BOUNDARIES)
    resumed = Run(recipe, program, seed=99)
    resumed.load(saved)
    resumed.train(2 * NUM_BOUNDARIES)
    assert_equal(resumed.saved(), whole.saved())
    assert resumed.model.seeds_not_dormant() == whole.model.seeds_not_dormant()
    names = [name for name, _p in whole.model.named_parameters()]
    assert names == [name for name, _p in resumed.model.named_parameters()]
    assert names == [name.removeprefix("module.") for name, _p in whole.average.named_parameters()]
    x = torch.randn(4, 5)
    for ours, theirs in ((whole.model, resumed.model), (whole.average, resumed.average)):
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


FULL_LIFE = [[("germinate", "0", 1, "bottleneck")], [], [("germinate", "4", 0, "low_rank")], [], [("cull", "4", 0, "")]]
FULL_LIFE += [[("germinate", "4", 0, "bottleneck"), ("fossilize", "0", 1, "")] for _n in range(NUM_BOUNDARIES - 5)]


def test_a_model_goes_back_in_place_to_what_it_was() -> None:
    run = Run(("adamw", "one cycle", False), FULL_LIFE)
    run.train(8)
    saved, parameters = run.saved(), list(run.model.host.parameters())
    run.train(20)
    run.load(copy.deepcopy(saved))  # an optimizer goes on with the very tensors that it loads
    assert_equal(run.saved(), saved)
    assert all(a is b for a, b in zip(parameters, run.model.host.parameters(), strict=True))
    run.train(28)
    again = Run(("adamw", "one cycle", False), FULL_LIFE, seed=3)
    again.load(saved)
    again.train(28)
    assert_equal(run.saved(), again.saved())


def test_an_average_grows_with_its_model_where_torchs_own_mixes_parameters_up() -> None:
    run = Run(("sgd", "none", False), FULL_LIFE)
    stock = AveragedModel(copy.deepcopy(run.model), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 2 * NUM_BOUNDARIES + 1):
        run.train(step)
        stock.update_parameters(run.model)
        now = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        if step == 1:
            expected = now
        before = {n: p for n, p in expected.items() if n in now and p.shape == now[n].shape}
        expected = {n: torch.lerp(before.get(n, p), p, 0.1) for n, p in now.items()}
    averaged = {n.removeprefix("module."): p for n, p in run.average.named_parameters()}
    assert averaged.keys() == expected.keys()
    assert any(name.startswith("kasmina.0.1") for name in averaged)
    for name, parameter in averaged.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-7)
    hosts = dict(stock.module.host.named_parameters())
    assert all(torch.equal(p, averaged[name]) for name, p in hosts.items())


@pytest.mark.parametrize("missing", ["scheduler", "scaler"])
def test_a_part_that_was_saved_and_is_missing_is_named(missing: str) -> None:
    run = Run(("sgd", "cosine", True), FULL_LIFE)
    saved = run.saved()
    recipe = ("sgd", "none", True) if missing == "scheduler" else ("sgd", "cosine", False)
    with pytest.raises(ContractError, match=f"saved with a {missing}"):
        Run(recipe, FULL_LIFE).load(saved)


def test_checkpoints_of_another_format_are_refused_before_anything_changes(tmp_path: Any) -> None:
    run = Run(("sgd", "none", False), FULL_LIFE)
    first_format = {k: v for k, v in run.saved().items() if k not in ("format", "scaler", "ranks")}
    CheckpointStore(tmp_path).save(first_format, 1)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ContractError, match="checkpoint has format 1, and this version of Esper reads format 2"):
        run.training.load_dict(CheckpointStore(tmp_path).load_newest())
    with pytest.raises(ContractError, match="seeds of format 3"):
        run.model.load_seed_state({**run.saved()["seeds"], "format": 3})
    assert_equal(dict(run.model.state_dict()), dict(before))
    assert run.model.seeds_not_dormant() == ()
