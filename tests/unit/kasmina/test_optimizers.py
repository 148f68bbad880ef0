"""Growth beside a running optimizer: what was there stays as it is, what joins follows its group."""

import copy
import hashlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import esper
from esper.errors import KernelError, NotSupportedError
from esper.kasmina.kernels import LoadedKernel, build_kernel, load_kernel
from esper.kasmina.lifecycle import StageSchedule
from esper.kasmina.model import MorphableModel
from esper.kasmina.optimizers import leave, plain_optimizer
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import SeedStage

OPTIONS = {"low_rank": {"rank": 2}, "bottleneck": {"expansion": 0.5}}
VARIANTS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "Muon": {},
    "Adadelta": {},
    "Rprop": {},
}
EAGER = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "ASGD"]
CASES = [(name, {}) for name in [*EAGER, "Adafactor", "Muon"]]
CASES += [(name, {"foreach": True}) for name in EAGER]
CASES += [(name, {"fused": True}) for name in ("SGD", "Adam", "AdamW", "Adagrad")]
CASES += [("AdamW", {"amsgrad": True}), ("RMSprop", {"centered": True, "momentum": 0.5})]


def kernel_for(model: MorphableModel, layer_id: str, module: str) -> LoadedKernel:
    layer = model.layers[layer_id]
    spec = BlueprintSpec(module=module, parameters=OPTIONS.get(module, {}), targets=(layer.kind,))
    data = build_kernel(module, spec, layer.kind, layer.num_features, seed=3)
    return load_kernel(data, hashlib.sha256(data).hexdigest())


def wrapped(*, bias: bool = True) -> MorphableModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 4, bias=bias))
    model = esper.wrap(net)
    model.schedule = StageSchedule(germinated=1, training=1, grafting=1, stabilizing=1, evaluating=9, embargo=1)
    return model


def germinate(model: MorphableModel, optimizer: Any, layer_id: str, module: str, step: int = 0) -> None:
    kernel = kernel_for(model, layer_id, module)
    plan = model.plan_germinate(layer_id, 0, kernel)
    model.apply_transition(plan, step=step, boundary=step, kernel=kernel, optimizer=optimizer)


def advance(model: MorphableModel, optimizer: Any, step: int) -> None:
    model.on_step(step)
    for plan in model.plan_advance(step):
        model.apply_transition(plan, step=step, boundary=step, optimizer=optimizer)


def grown(model: MorphableModel) -> dict[str, nn.Parameter]:
    return dict(model.named_seed_parameters())


def train(model: nn.Module, optimizer: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    optimizer.zero_grad()
    model(torch.randn(7, 5, generator=generator)).square().mean().backward()
    optimizer.step()


def everything(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[parameter].items()}


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize(("name", "variant"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain")
def test_every_optimizer_grows_and_shrinks_and_what_was_there_never_notices(name: str, variant: dict[str, Any]) -> None:
    bias = name != "Muon"
    model, twin = wrapped(bias=bias), wrapped(bias=bias)
    make = getattr(torch.optim, name)
    arguments = {**VARIANTS.get(name, {"lr": 0.01}), **variant}
    optimizer, other = make(model.parameters(), **arguments), make(twin.parameters(), **arguments)
    schedulers = [lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, other)]

    def both(step: int) -> None:
        train(model, optimizer, step)
        train(twin, other, step)
        for scheduler in schedulers:
            scheduler.step()

    for step in range(3):
        both(step)
    germinate(model, optimizer, "0", "low_rank" if name == "Muon" else "bottleneck")
    advance(model, optimizer, 1)
    assert model.seed("0", 0).stage is SeedStage.TRAINING
    before = {n: p.detach().clone() for n, p in grown(model).items()}
    for step in range(3, 6):
        both(step)
    for mine, others in zip(model.host.parameters(), twin.host.parameters(), strict=True):
        assert torch.equal(mine, others)
        for key, value in everything(optimizer, mine).items():
            assert_same(value, everything(other, others)[key])
    assert any(not torch.equal(p, before[n]) for n, p in grown(model).items())
    state = {id(p): optimizer.state[p] for p in model.host.parameters()}
    model.apply_transition(model.plan_cull("0", 0), step=6, boundary=6, optimizer=optimizer)
    assert [g["params"] for g in optimizer.param_groups] == [list(model.host.parameters())]
    assert {id(p): s for p, s in optimizer.state.items()} == state
    for step in range(6, 8):
        both(step)
    for mine, others in zip(model.host.parameters(), twin.host.parameters(), strict=True):
        assert torch.equal(mine, others)


def test_what_joins_late_starts_as_what_was_there_from_the_start() -> None:
    model = wrapped()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.25)
    germinate(model, optimizer, "0", "bottleneck")
    for parameter in grown(model).values():
        assert torch.equal(optimizer.state[parameter]["sum"], torch.full_like(parameter, 0.25))
        assert optimizer.state[parameter]["step"] == 0


def decay_split(model: MorphableModel, **kinds: Any) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if p.dim() >= 2 and not n.startswith("2.")]
    vectors = [(n, p) for n, p in named if p.dim() < 2 and not n.startswith("2.")]
    last = [(n, p) for n, p in named if n.startswith("2.")]
    groups = [{"params": last, "lr": 0.5}, {"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3, **kinds)


def test_a_seed_follows_the_groups_of_its_layer_and_their_names() -> None:
    model = wrapped()
    optimizer = decay_split(model)
    before = copy.deepcopy([g["param_names"] for g in optimizer.param_groups])
    germinate(model, optimizer, "0", "bottleneck")
    germinate(model, optimizer, "2", "bottleneck")
    by_name = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    for name, parameter in grown(model).items():
        group = by_name[name]
        assert group["params"][group["param_names"].index(name)] is parameter
        if name.startswith("kasmina.2."):
            assert group["lr"] == 0.5
        else:
            assert group["weight_decay"] == (0.3 if parameter.dim() >= 2 else 0.0)
    assert all(len(g["params"]) == len(g["param_names"]) for g in optimizer.param_groups)
    model.apply_transition(model.plan_cull("0", 0), step=1, boundary=1, optimizer=optimizer)
    model.apply_transition(model.plan_cull("2", 0), step=1, boundary=1, optimizer=optimizer)
    assert [g["param_names"] for g in optimizer.param_groups] == before


def test_beside_a_frozen_layer_a_seed_joins_the_first_group() -> None:
    model = wrapped()
    model.host[0].requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": model.host[2].parameters()}], lr=0.1)
    germinate(model, optimizer, "0", "bottleneck")
    advance(model, optimizer, 1)
    before = {n: p.detach().clone() for n, p in grown(model).items()}
    train(model, optimizer, 1)
    assert len(optimizer.param_groups[0]["params"]) == 2 + 4
    assert not torch.equal(grown(model)["kasmina.0.0.2.bias"], before["kasmina.0.0.2.bias"])


def scheduler_of(kind: str, optimizer: torch.optim.Optimizer) -> Any:
    makers = {
        "OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2, 0.3], total_steps=20),
        "LambdaLR": lambda: lr_scheduler.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 1.0, lambda n: 1 / (n + 1)]),
        "ReduceLROnPlateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.0, 0.0, 0.0]),
        "SequentialLR": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 10)],
            milestones=[3],
        ),
        "SWALR": lambda: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05),
    }
    return makers[kind]()


@pytest.mark.parametrize("kind", ["OneCycleLR", "LambdaLR", "ReduceLROnPlateau", "SequentialLR", "SWALR"])
def test_schedulers_go_on_and_move_what_has_grown(kind: str) -> None:
    model, twin = wrapped(), wrapped()
    optimizers = decay_split(model), decay_split(twin)
    schedulers = [scheduler_of(kind, o) for o in optimizers]
    arguments = (1.0,) if kind == "ReduceLROnPlateau" else ()
    for step in range(8):
        if step == 2:
            germinate(model, optimizers[0], "0", "bottleneck")
            advance(model, optimizers[0], 1)
        for network, optimizer, scheduler in zip((model, twin), optimizers, schedulers, strict=True):
            train(network, optimizer, step)
            scheduler.step(*arguments)
        rates = [[(g["lr"], g["betas"]) for g in o.param_groups] for o in optimizers]
        assert rates[0] == rates[1]
    for mine, others in zip(model.host.parameters(), twin.host.parameters(), strict=True):
        assert torch.equal(mine, others)


def test_accumulated_clipped_and_scaled_gradients_reach_what_has_grown() -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    germinate(model, optimizer, "0", "bottleneck")
    advance(model, optimizer, 1)
    before = {n: p.detach().clone() for n, p in grown(model).items()}
    for step in range(3):
        optimizer.zero_grad()
        for _part in range(2):
            scaler.scale(model(torch.randn(7, 5)).square().mean() / 2).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert all(p.grad is not None and p.grad.norm() <= 1e-3 for p in model.parameters()), step
        assert norm > 1e-3
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2048.0
    assert not torch.equal(grown(model)["kasmina.0.0.2.bias"], before["kasmina.0.0.2.bias"])


class Holder:
    """What Accelerate's and Lightning's optimizers look like from outside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_the_optimizer_inside_a_wrapper_is_found() -> None:
    model = wrapped()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    assert plain_optimizer(Holder(Holder(inner))) is inner  # type: ignore[arg-type]
    germinate(model, Holder(inner), "0", "bottleneck")
    assert len(inner.param_groups[0]["params"]) == 4 + 4
    leave(Holder(inner), grown(model).values())  # type: ignore[arg-type]
    assert len(inner.param_groups[0]["params"]) == 4


@pytest.mark.parametrize("kind", ["LBFGS", "SparseAdam", "object"])
def test_an_optimizer_that_cannot_grow_is_refused_before_anything_changes(kind: str) -> None:
    model = wrapped()
    parameters = list(model.parameters())
    optimizer: Any = object() if kind == "object" else getattr(torch.optim, kind)(parameters)
    with pytest.raises(NotSupportedError, match=kind):
        plain_optimizer(optimizer)
    with pytest.raises(NotSupportedError, match=kind):
        germinate(model, optimizer, "0", "bottleneck")
    assert model.seeds_not_dormant() == ()
    assert list(model.parameters()) == parameters


def test_muon_refuses_a_kernel_with_vectors_before_anything_changes() -> None:
    model = wrapped(bias=False)
    optimizer = torch.optim.Muon(model.parameters())
    with pytest.raises(KernelError, match="Muon takes matrices only"):
        germinate(model, optimizer, "0", "bottleneck")
    assert model.seeds_not_dormant() == ()
    assert optimizer.param_groups[0]["params"] == list(model.host.parameters())
