"""Seeds in layers: free while dormant, isolated while training, exact through a checkpoint."""

import copy
import io
import math

import pytest
import torch
from support.models.growing_model import batch, germinate, kernel_for, train_step, train_to, wrapped
from support.models.growing_model import plain as plain_net
from torch import nn

import esper
from esper.errors import ContractError, KernelError
from esper.kasmina.autograd import Isolated
from esper.kasmina.catalogue import CATALOGUE
from esper.kasmina.model import MorphableModel
from esper.schemas.enums import SeedStage

S = SeedStage


def test_a_dormant_model_is_the_plain_one_to_the_bit() -> None:
    plain, model = plain_net(), wrapped()
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.host.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    first, second = torch.optim.AdamW(plain.parameters()), torch.optim.AdamW(model.parameters())
    for n in range(5):
        assert torch.equal(train_step(plain, first, n), train_step(model, second, n))
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("layer_id", ["conv", "fc1", "fc2"])
@pytest.mark.parametrize("module", sorted(CATALOGUE))
def test_every_kernel_starts_as_identity_and_goes_through_its_life(layer_id: str, module: str) -> None:
    model, plain = wrapped(), plain_net()
    if model.layers[layer_id].kind not in CATALOGUE[module].targets:
        with pytest.raises(KernelError, match="does not go into"):
            kernel_for(model, layer_id, module)
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    germinate(model, layer_id, module=module, optimizer=optimizer)
    x, _y = batch(0)
    assert torch.equal(model(x), plain(x))
    n = train_to(model, optimizer, layer_id, 0, S.EVALUATING)
    assert model.seed(layer_id, 0).alpha == 1.0
    plan = model.plan_fossilize(layer_id, 0)
    model.apply_transition(plan, step=n, boundary=n // 2, optimizer=optimizer)
    assert isinstance(model.layers[layer_id].module, (nn.Linear, nn.Conv2d))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.num_parameters_grown == kernel_for(model, layer_id, module).num_parameters


def test_a_seed_in_training_leaves_the_host_as_it_is_and_learns() -> None:
    plain, model = plain_net(), wrapped()
    first = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    germinate(model, "fc1", optimizer=second)
    for plan in model.plan_advance(1):
        model.apply_transition(plan, step=2, boundary=1, optimizer=second)
    assert model.seed("fc1", 0).stage is S.TRAINING
    before = [p.clone() for _name, p in model.named_seed_parameters()]
    for n in range(10):
        assert torch.equal(train_step(plain, first, n), train_step(model, second, n))
    for a, b in zip(plain.parameters(), model.host.parameters(), strict=True):
        assert torch.equal(a, b)
    after = [p for _name, p in model.named_seed_parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_isolation_keeps_negative_zero_and_infinity() -> None:
    h = torch.tensor([-0.0, math.inf, -math.inf, 1.5], requires_grad=True)
    s = torch.tensor([1.0, -2.0, 2.0, 0.0], requires_grad=True)
    out = Isolated.apply(h, s, torch.tensor(True), 1, 4, 1.0)
    assert out.numpy(force=True).tobytes() == h.numpy(force=True).tobytes()
    out.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(h.grad, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(s.grad, h.grad + s.detach())


def test_a_culled_seed_leaves_no_trace_and_can_come_back_after_the_embargo() -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(model.parameters())
    num_params = len(optimizer.param_groups[0]["params"])
    germinate(model, "fc1", optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == num_params + 2
    n = train_to(model, optimizer, "fc1", 0, S.GRAFTING)
    model.apply_transition(model.plan_cull("fc1", 0), step=n, boundary=n // 2, optimizer=optimizer)
    assert model.seed("fc1", 0).stage is S.CULLED
    assert type(model.layers["fc1"].module) is nn.Linear
    assert len(optimizer.param_groups[0]["params"]) == num_params
    assert len(optimizer.state) == num_params
    with pytest.raises(ContractError, match="cannot become"):
        germinate(model, "fc1", optimizer=optimizer)
    n = train_to(model, optimizer, "fc1", 0, S.DORMANT, start=n)
    germinate(model, "fc1", optimizer=optimizer, step=n)


def test_a_seed_that_nobody_decides_about_is_culled() -> None:
    model = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    germinate(model, "fc2", optimizer=optimizer)
    train_to(model, optimizer, "fc2", 0, S.CULLED)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", [S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZING, S.EVALUATING, S.CULLED])
def test_a_resumed_model_goes_on_to_the_bit(kind: str, stage: SeedStage) -> None:
    def optimizer_for(model: MorphableModel) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    model = wrapped()
    optimizer = optimizer_for(model)
    for n in range(4):
        train_step(model, optimizer, n)
    germinate(model, "fc1", 1, optimizer=optimizer)
    germinate(model, "conv", 0, "residual", optimizer=optimizer)
    n = 0 if stage is S.GERMINATED else train_to(model, optimizer, "fc1", 1, stage)
    saved = io.BytesIO()
    torch.save({"host": model.state_dict(), "seeds": model.seed_state(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    other = wrapped(seed=99)
    other_optimizer = optimizer_for(other)
    other.load_state_dict(loaded["host"])
    other.load_seed_state(loaded["seeds"], other_optimizer)
    other_optimizer.load_state_dict(loaded["optimizer"])
    assert other.seeds_not_dormant() == model.seeds_not_dormant()
    for m, o in ((model, optimizer), (other, other_optimizer)):
        for k in range(n + 1, n + 9):
            train_step(m, o, k)
            m.on_step(k)
            if k % 2 == 0:
                for plan in m.plan_advance(k // 2):
                    m.apply_transition(plan, step=k, boundary=k // 2, optimizer=o)
    for (name, a), (_same, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_kernel_of_another_width_does_not_germinate() -> None:
    model = wrapped()
    with pytest.raises(KernelError, match="for linear layers of 8"):
        model.plan_germinate("fc2", 0, kernel_for(model, "fc1"))


def test_the_graph_follows_the_data() -> None:
    nodes, edges = wrapped().graph()
    assert [(n.layer_id, n.kind, n.num_features, n.num_seeds) for n in nodes] == [
        ("conv", "conv2d", 6, 4),
        ("fc1", "linear", 8, 4),
        ("fc2", "linear", 4, 4),
    ]
    assert [(e.source, e.target) for e in edges] == [("conv", "fc1"), ("fc1", "fc2")]


def test_wrap_refuses_what_it_cannot_do() -> None:
    model = wrapped()
    with pytest.raises(ContractError, match="wrapped already"):
        esper.wrap(model)
    with pytest.raises(ContractError, match="no layer of Linear"):
        esper.wrap(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="BatchNorm1d cannot hold seeds"):
        esper.wrap(nn.BatchNorm1d(3), target_layers=[nn.BatchNorm1d])


def test_tied_weights_and_deep_copies_work() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    model = esper.wrap(net)
    assert len(list(model.parameters())) == 3
    twin = copy.deepcopy(model)
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), model(x))
    assert twin.layers["0"].module is twin.host[0]
