"""A layer with awake seeds works in anybody's training loop, and a seed that fails harms nobody."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.faults.seed_faults import BACKWARD, FAULTS, Act, Faulty, raises
from support.models.growing_model import (
    SmallNet,
    advance_to,
    batch,
    germinate,
    grown,
    loss_of,
    plain,
    train_step,
    wrapped,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.errors import ContractError, NotSupportedError
from esper.kasmina.autograd import isolated_gradient
from esper.kasmina.breaker import OPEN_S, Breaker
from esper.kasmina.hosts import batching_of
from esper.kasmina.lifecycle import AlphaCurve
from esper.kasmina.model import MorphableModel
from esper.kasmina.seeds import AwakeSeed
from esper.schemas.enums import BreakerState, LayerKind, SeedStage

S, B = SeedStage, BreakerState


def awake(model: MorphableModel, layer_id: str = "fc1", seed_id: int = 0) -> AwakeSeed:
    return model.layers[layer_id].awake[seed_id]


def writes_into_its_input(h: Tensor) -> Tensor:
    h.zero_()
    raise RuntimeError("broken")


def replace_module(seed: AwakeSeed, act: Act) -> Faulty:
    faulty = Faulty(act)
    seed.module = faulty
    seed.time_limit_s = 0.05 if act is FAULTS["hangs"] else 30.0
    return faulty


def gradients(model: nn.Module, n: int) -> list[Tensor]:
    model.zero_grad()
    loss_of(model, n).backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]  # the host's first


@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.EVALUATING])
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_seed_does_the_step_is_the_hosts(fault: str, stage: SeedStage) -> None:
    model, _optimizer, _step = grown(stage)
    host = plain()
    host.load_state_dict(model.state_dict())
    replace_module(awake(model), FAULTS[fault])
    for n in range(2):
        expected, got = gradients(host, n), gradients(model, n)
        is_forward = fault not in BACKWARD
        if is_forward or stage is S.TRAINING:
            assert torch.equal(loss_of(model, n), loss_of(host, n))
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=False))
        assert all(torch.isfinite(g).all() for g in got)
    assert awake(model).breaker.num_failures > 0
    with torch.no_grad():
        x, _y = batch(0)
        if is_forward:
            assert torch.equal(model(x), host(x))


def test_a_breaker_opens_tries_again_after_its_time_and_gives_up_after_that() -> None:
    now = 0.0
    model, optimizer, step = grown(S.GRAFTING)
    seed = awake(model)
    healthy, seed.breaker = seed.module, Breaker(lambda: now)
    faulty = replace_module(seed, raises)
    for n in range(4):
        train_step(model, optimizer, n)
        model.on_step(step + n)
    assert faulty.num_calls == 3
    (change,) = model.breaker_changes()
    model.report_breaker(change)
    assert model.breaker_changes() == []
    assert (change.from_state, change.to_state, change.num_failures) == (B.CLOSED, B.OPEN, 3)
    assert "broken" in change.detail
    alpha = seed.gain
    for n in range(20):
        model.on_step(step + 4 + n)
        assert model.plan_advance(1000) == []
    assert seed.gain == alpha
    now += OPEN_S
    seed.module = healthy
    train_step(model, optimizer, 5)
    assert seed.breaker.state is B.CLOSED
    replace_module(seed, FAULTS["gives NaN"])
    train_step(model, optimizer, 6)
    assert seed.breaker.state is B.OPEN, "one output that is not finite is enough"
    now += OPEN_S
    train_step(model, optimizer, 7)
    (plan,) = model.plan_advance(1000)
    assert (plan.to_stage, plan.reason) == (S.CULLED, "failure")
    assert "not finite" in plan.detail


def test_a_host_that_is_sick_itself_is_not_the_seeds_fault() -> None:
    model, _optimizer, _step = grown(S.EVALUATING)
    with torch.no_grad():
        model.host.fc1.weight.fill_(math.nan)
    loss_of(model, 0).backward()
    assert awake(model).breaker.num_failures == 0


def test_a_layer_that_is_never_called_gives_its_seed_up() -> None:
    class ReadsWeight(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            h = self.relu(self.conv(x)).flatten(1)
            return self.fc2(self.relu(nn.functional.linear(h, self.fc1.weight, self.fc1.bias)))

    torch.manual_seed(0)
    model = wrapped(net=ReadsWeight())
    germinate(model, "fc1")
    advance_to(model, "fc1", 0, S.CANCELLED, train=lambda n: loss_of(model, n).backward())


def test_seeds_of_one_layer_act_in_the_order_of_their_ids() -> None:
    model = wrapped()
    for seed_id in (1, 0):
        germinate(model, "fc1", seed_id)
    advance_to(model, "fc1", 0, S.EVALUATING, train=lambda n: loss_of(model, n).backward())
    awake(model, seed_id=0).module = Faulty(lambda h: h + 1.0)
    awake(model, seed_id=1).module = Faulty(lambda h: h * 2.0)
    x = torch.randn(2, 96)
    h = nn.functional.linear(x, model.host.fc1.weight, model.host.fc1.bias)
    with torch.no_grad():
        assert torch.equal(model.host.fc1(x), 3 * (h + (h + 1.0)))


@pytest.mark.parametrize("stage", [S.TRAINING, S.EVALUATING])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_change_nothing_even_around_a_seed_that_fails_once(
    stage: SeedStage, use_reentrant: bool
) -> None:
    model, _optimizer, _step = grown(stage)
    for a, b in zip(checkpointed(model, use_reentrant), gradients(model, 1), strict=True):
        assert torch.equal(a, b)
    seed = awake(model)
    healthy, calls = seed.module, iter(range(10))
    replace_module(seed, lambda h: raises(h) if next(calls) == 0 else healthy(h))
    assert all(torch.isfinite(g).all() for g in checkpointed(model, use_reentrant))


def checkpointed(model: MorphableModel, use_reentrant: bool) -> list[Tensor]:
    x, y = batch(1)
    model.zero_grad()
    out = checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)
    nn.functional.cross_entropy(out, y).backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING])
def test_autocast_and_memory_formats_go_through(stage: SeedStage) -> None:
    model, _optimizer, _step = grown(stage, "conv", "residual")
    x, _y = batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.host.conv(x).dtype == torch.bfloat16
        model(x).float().sum().backward()
    assert awake(model, "conv").breaker.num_failures == 0
    model.to(memory_format=torch.channels_last)
    h = model.host.conv(torch.randn(2, 1, 4, 4).to(memory_format=torch.channels_last))
    assert h.is_contiguous(memory_format=torch.channels_last)
    half = model.to(torch.bfloat16)
    half(x.to(torch.bfloat16)).sum().backward()
    assert awake(model, "conv").breaker.num_failures == 0


def test_what_cannot_be_done_with_awake_seeds_is_refused_clearly() -> None:
    model, _optimizer, _step = grown(S.GRAFTING)
    x, _y = batch(0)
    with pytest.raises(NotSupportedError, match=r"torch\.func"):
        torch.func.vmap(model)(x.unsqueeze(1))
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x, retain_graph=True)
    with pytest.raises(NotSupportedError, match="differentiable_twice"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    model.differentiable_twice = True
    (twice,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert torch.allclose(twice, gradient)
    twice.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_graph_that_is_retained_can_be_walked_again() -> None:
    model, _optimizer, _step = grown(S.EVALUATING)
    model.zero_grad()
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(once, model.parameters(), strict=True))


@pytest.mark.parametrize("stage", [S.GERMINATED, S.TRAINING, S.EVALUATING])
def test_copies_and_pickles_of_a_grown_model_live_on_by_themselves(stage: SeedStage) -> None:
    model, optimizer, _step = grown(stage)
    model.probe.arm()
    x, _y = batch(0)
    for make_twin in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = make_twin(model)
        assert torch.equal(twin(x), model(x))
        assert twin.seeds_not_dormant() == model.seeds_not_dormant()
        before = [p.clone() for p in twin.parameters()]
        train_step(model, optimizer, 1)
        assert all(torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True))
        train_step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 1)


def test_a_forward_that_somebody_put_on_a_module_is_kept() -> None:
    net = plain()
    theirs = net.fc1.forward
    net.fc1.forward = lambda x: theirs(x) + 1.0  # type: ignore[method-assign]
    mine = net.fc1.__dict__["forward"]
    model = wrapped(net=net)
    germinate(model, "fc1")
    step = advance_to(model, "fc1", 0, S.EVALUATING, train=lambda n: loss_of(model, n).backward())
    awake(model).module = Faulty(lambda h: torch.ones_like(h))
    x = torch.randn(2, 96)
    with torch.no_grad():
        assert torch.equal(net.fc1(x), mine(x) + 1.0)
        model.apply_transition(model.plan_cull("fc1", 0), step=step, boundary=step // 2)
        assert torch.equal(net.fc1(x), mine(x))
    assert net.fc1.__dict__["forward"] is mine


@example(AlphaCurve.SIGMOID, [0.9999999999999999, 1.0])
@given(st.sampled_from(AlphaCurve), st.lists(st.floats(-1, 2), min_size=2).map(sorted))
def test_alpha_rises_from_0_to_1_and_never_falls(curve: AlphaCurve, shares: list[float]) -> None:
    alphas = [curve.at(share) for share in shares]
    assert all(a <= b for a, b in pairwise(alphas))
    assert all(0.0 <= a <= 1.0 for a in alphas)
    assert (curve.at(0.0), curve.at(1.0)) == (0.0, 1.0)
    assert curve.at(0.5) == pytest.approx(0.5)


def test_an_isolated_seed_settles_where_it_is_one_gradient_step_whatever_the_number_of_positions() -> None:
    for kind, shape, n in [
        (LayerKind.LINEAR, (3, 5), 3),
        (LayerKind.LINEAR, (3, 7, 5), 3),
        (LayerKind.LINEAR, (5,), 1),
        (LayerKind.CONV1D, (3, 5, 7), 3),
        (LayerKind.CONV2D, (3, 5, 4, 4), 3),
        (LayerKind.CONV2D, (5, 4, 4), 1),
    ]:
        torch.manual_seed(0)
        s, g = torch.zeros(shape), torch.randn(shape)
        assert batching_of(nn.Identity(), kind).num_samples(s) == n
        for _n in range(60 * s.numel() // (5 * n)):
            s -= 0.5 * isolated_gradient(g, s, n, 5)
        assert torch.allclose(s, -n * g, atol=1e-3), "N times the gradient of a mean over N samples"


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_and_scaling_the_loss_leave_an_isolated_seed_and_its_host_alone(max_norm: float) -> None:
    def run(scale: float, *, with_seed: bool) -> list[Tensor]:
        model = wrapped()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        model.grad_scaler = scaler
        if with_seed:
            germinate(model, "fc1", optimizer=optimizer)
            (plan,) = model.plan_advance(1)
            model.apply_transition(plan, step=2, boundary=1, optimizer=optimizer)
        for n in range(20):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, n)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
            model.on_step(n)
        return [p.detach() for p in (*model.host.parameters(), *dict(model.named_seed_parameters()).values())]

    alone, unscaled, scaled = run(1.0, with_seed=False), run(1.0, with_seed=True), run(2.0**16, with_seed=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, unscaled, strict=False))
    for a, b in zip(unscaled, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [S.TRAINING, S.EVALUATING])
def test_a_seed_that_writes_into_what_it_is_given_harms_nobody(stage: SeedStage) -> None:
    model, _optimizer, _step = grown(stage)
    host = plain()
    host.load_state_dict(model.state_dict())
    awake(model).module = Faulty(writes_into_its_input)
    awake(model).module.forward = writes_into_its_input  # type: ignore[method-assign]
    assert torch.equal(loss_of(model, 0), loss_of(host, 0))


def test_one_seed_is_not_shut_out_by_a_loss_scale_that_half_precision_does_not_hold() -> None:
    model = wrapped(net=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    model.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    germinate(model, "0")
    (plan,) = model.plan_advance(1)
    model.apply_transition(plan, step=2, boundary=1)
    with torch.autocast("cpu", torch.float16):
        loss = model(torch.randn(1, 4)).float().square().mean() * 1e-4
    model.grad_scaler.scale(loss).backward()
    assert awake(model, "0").breaker.num_failures == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for _name, p in model.named_seed_parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_one_model_is_wrapped_once_and_refuses_to_be_traced_while_a_seed_is_awake() -> None:
    model, _optimizer, _step = grown(S.EVALUATING)
    with pytest.raises(ContractError, match="wrapped already"):
        wrapped(net=model.host)
    with torch.no_grad(), pytest.raises(NotSupportedError, match="trace"):
        torch.jit.trace(model, batch(0)[:1])
    again = wrapped(net=wrapped().unwrap())
    assert again.seeds_not_dormant() == ()


def test_attributes_of_the_host_are_set_on_the_host_and_layers_with_seeds_stay() -> None:
    model = wrapped()
    model.relu = nn.GELU()
    assert isinstance(model.host.relu, nn.GELU)
    with pytest.raises(ContractError, match="fc2 holds seeds"):
        model.fc2 = nn.Linear(8, 7)


def test_an_optimizer_that_was_made_during_training_gets_the_seed_when_it_moves_on() -> None:
    model, _optimizer, step = grown(S.TRAINING)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    boundary = step // 2 + 9
    for plan in model.plan_advance(boundary):
        model.apply_transition(plan, step=step, boundary=boundary, optimizer=other)
    held = {id(p) for group in other.param_groups for p in group["params"]}
    assert all(id(p) in held for _name, p in model.named_seed_parameters())
