"""wrap() on models of all sorts: what gets seeds, what is refused, and how the plain model comes back."""

import copy
import io
import re
import time
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import esper
from esper.errors import ContractError
from esper.kasmina.kernels import LoadedKernel, build_kernel, load_kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import StageSchedule
from esper.kasmina.model import MorphableModel
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import SeedStage

S = SeedStage


def kernel_for(handle: KasminaLayer) -> LoadedKernel:
    import hashlib

    spec = BlueprintSpec(module="low_rank", parameters={"rank": 2}, targets=(handle.kind,))
    data = build_kernel("low-rank-2", spec, handle.kind, handle.num_features)
    return load_kernel(data, hashlib.sha256(data).hexdigest())


def grow(model: MorphableModel, layer_id: str, to: SeedStage = S.EVALUATING) -> None:
    """Take seed 0 of a layer to a stage, with weights that make a difference."""
    model.schedule = StageSchedule(germinated=1, training=1, grafting=1, stabilizing=1, evaluating=9, embargo=1)
    kernel = kernel_for(model.layers[layer_id])
    model.apply_transition(model.plan_germinate(layer_id, 0, kernel), step=0, boundary=0, kernel=kernel)
    with torch.no_grad():
        for n, p in enumerate(model.awake[layer_id, 0].module.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) * 0.3)
    model.awake[layer_id, 0].has_run = True  # else it would be given up as one that is never called
    boundary = 0
    while model.seed(layer_id, 0).stage not in (to, S.EVALUATING):
        boundary += 1
        for plan in model.plan_advance(boundary):
            model.apply_transition(plan, step=boundary, boundary=boundary)
    if to is S.FOSSILIZED:
        model.apply_transition(model.plan_fossilize(layer_id, 0), step=boundary, boundary=boundary)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


# -- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("layers.?.linear1", ["layers.0.linear1", "layers.1.linear1"]),
        (re.compile(r"layers\.1\.linear\d"), ["layers.1.linear1", "layers.1.linear2"]),
        ([lambda name, m: isinstance(m, nn.Linear) and m.out_features == 16], ["layers.0.linear1", "layers.1.linear1"]),
        (["layers.1.linear2", nn.MultiheadAttention], ["layers.0.self_attn", "layers.1.self_attn", "layers.1.linear2"]),
    ],
)
def test_layers_are_named_by_class_pattern_or_predicate(target, found: list[str]) -> None:
    assert list(esper.wrap(encoder(), target).layers) == found


def test_names_that_fit_nothing_and_layers_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ContractError, match=r"no module 'layers.0.liner1': did you mean 'layers.0.linear1'"):
        esper.wrap(encoder(), "layers.0.liner1")
    with pytest.raises(ContractError, match="no module whose name fits 'decoder"):
        esper.wrap(encoder(), ["decoder.*", nn.Linear])
    with pytest.raises(ContractError, match=r"layers.0.norm1 cannot hold seeds"):
        esper.wrap(encoder(), ["layers.0.norm1", nn.Linear])


def test_a_module_under_two_names_is_one_layer() -> None:
    net = nn.Module()
    net.first = net.second = nn.Linear(4, 4)
    net.forward = lambda x: net.second(net.first(x))
    model = esper.wrap(net)
    assert list(model.layers) == ["first"]
    x = torch.randn(3, 4)
    before = model(x)
    grow(model, "first")
    assert not torch.equal(model(x), before)


def test_lazy_quantized_scripted_and_parallel_models_are_refused_with_what_to_do() -> None:
    with pytest.raises(ContractError, match="run one forward pass"):
        esper.wrap(nn.Sequential(nn.LazyLinear(4)))
    lazy = nn.Sequential(nn.LazyLinear(4))
    lazy(torch.randn(2, 5))
    assert list(esper.wrap(lazy).layers) == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that eager quantization will go
        scripted = torch.jit.script(mlp())
        quantized = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    with pytest.raises(ContractError, match=r"is quantized .* wrap the float model"):
        esper.wrap(quantized)
    with pytest.raises(ContractError, match="wrap the model it was made from"):
        esper.wrap(scripted)
    with pytest.raises(ContractError, match="wrap the model first"):
        esper.wrap(nn.DataParallel(mlp()))


class Int8Linear(nn.Linear):
    """As libraries of quantized layers have it: a Linear whose weight is not of floating point."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_a_general_target_passes_over_quantized_layers_and_a_named_one_does_not() -> None:
    net = nn.Sequential(Int8Linear(4, 4), nn.Linear(4, 2))
    model = esper.wrap(net)
    assert list(model.layers) == ["1"]
    assert "quantized" in model.skipped["0"]
    with pytest.raises(ContractError, match=r"0 cannot hold seeds: its weight is Parameter of int8"):
        esper.wrap(net, "0")
    with pytest.raises(ContractError, match="can hold seeds"):
        esper.wrap(nn.Sequential(Int8Linear(4, 4)))


# -- layers of all sorts --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "half", "frozen"])
def test_layers_of_all_sorts_are_exact_while_dormant_and_grow(kind: str) -> None:
    make = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
        "old weight_norm": nn.utils.weight_norm,
        "half": lambda layer: layer.bfloat16(),
        "frozen": lambda layer: layer.requires_grad_(False),
    }[kind]

    def net() -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # weight_norm of old is deprecated, and in use
            return nn.Sequential(make(nn.Linear(6, 6)), nn.Tanh())

    plain, model = net(), esper.wrap(net())
    x = torch.randn(4, 6, dtype=torch.bfloat16 if kind == "half" else torch.float32)
    assert torch.equal(plain(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    grow(model, "0", S.TRAINING)
    assert torch.equal(plain(x), model(x))
    assert list(model.state_dict()) == list(plain.state_dict())
    other = esper.wrap(net())
    grow(other, "0")
    assert not torch.equal(net()(x), other(x))
    other(x).float().sum().backward()
    assert all(p.grad is not None for p in other.awake["0", 0].module.parameters())
    assert type(esper.unwrap(other)[0]).__name__ == type(plain[0]).__name__  # parametrized ones have a class each


def test_a_layer_whose_parent_only_reads_its_weight_passes_its_seeds_on_or_is_passed_over() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.called.weight.requires_grad
            return self.inside_a_function(lambda y: self.called(y), self.half_way(x))

        def inside_a_function(self, function, x: torch.Tensor) -> torch.Tensor:
            return function(x)

        def half_way(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.read.weight, self.read.bias)

    model = esper.wrap(Reads())
    assert list(model.layers) == ["called"]
    assert model.skipped == {"read": "Reads reads its weight and never calls it"}
    attention = esper.wrap(nn.MultiheadAttention(8, 2, batch_first=True))
    assert list(attention.layers) == ["MultiheadAttention"]
    x = torch.randn(2, 5, 8)
    before, weights = attention(x, x, x)
    grow(attention, "MultiheadAttention")
    after, same_weights = attention(x, x, x)
    assert torch.equal(weights, same_weights)
    assert not torch.equal(before, after)


def test_the_fast_path_of_an_encoder_is_taken_while_dormant_and_closed_while_a_seed_is_awake() -> None:
    plain, model = encoder().eval(), esper.wrap(encoder()).eval()
    x = torch.randn(3, 5, 8)
    padded = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested tensors are a prototype
        fast = plain(x, src_key_padding_mask=padded)
        assert torch.equal(model(x, src_key_padding_mask=padded), fast)
        for layer_id in ("layers.0.linear1", "layers.1.self_attn"):
            grow(model, layer_id)
            assert not torch.allclose(model(x, src_key_padding_mask=padded), fast, atol=1e-3)
            twin = copy.deepcopy(model)
            assert torch.equal(twin(x, src_key_padding_mask=padded), model(x, src_key_padding_mask=padded))
            model.apply_transition(model.plan_cull(layer_id, 0), step=9, boundary=9)
            assert torch.equal(model(x, src_key_padding_mask=padded), fast)
    assert [vars(m).keys() for m in model.unwrap().modules()] == [vars(m).keys() for m in plain.modules()]


def test_hooks_stay_and_see_what_the_layer_gives_with_its_seeds() -> None:
    net = mlp()
    seen = []
    net[2].register_forward_hook(lambda _m, _a, output: seen.append(output))
    model = esper.wrap(net)
    x = torch.randn(2, 6)
    model(x)
    grow(model, "2")
    model(x)
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_a_compiled_model_keeps_its_keys_and_its_layers_go_by_their_plain_names() -> None:
    compiled = torch.compile(mlp(), backend="eager")
    model = esper.wrap(compiled)
    assert list(model.layers) == ["0", "2", "4"]
    assert list(model.state_dict()) == list(compiled.state_dict())
    x = torch.randn(2, 6)
    before = model(x)
    assert torch.equal(before, mlp()(x))
    grow(model, "2")
    assert not torch.equal(model(x), before)
    assert [(e.source, e.target) for e in model.graph()[1]] == [("0", "2"), ("2", "4")]


def test_wrapping_takes_less_than_a_second_at_a_billion_parameters() -> None:
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(2048, 2048) for _n in range(240)))
    began = time.process_time()  # of this process alone, whatever else the machine does
    model = esper.wrap(net)
    took = time.process_time() - began
    assert sum(p.numel() for p in model.parameters()) > 1_000_000_000
    assert took < 1.0
    assert {(e.source, e.target) for e in model.graph()[1]} == set(pairwise(model.layers))


# -- out again ------------------------------------------------------------------------------------


def test_unwrap_gives_the_plain_model_back_and_drops_seeds_under_way() -> None:
    net = mlp()
    classes, attributes = [type(m) for m in net.modules()], [set(vars(m)) for m in net.modules()]
    x = torch.randn(2, 6)
    before = net(x)
    model = esper.wrap(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.probe.arm()
    grow(model, "2")
    optimizer.param_groups[0]["params"].extend(model.awake["2", 0].module.parameters())
    assert esper.unwrap(model, optimizer) is net
    assert [type(m) for m in net.modules()] == classes
    assert [set(vars(m)) for m in net.modules()] == attributes
    assert not any(m._forward_hooks for m in net.modules())
    assert optimizer.param_groups[0]["params"] == list(net.parameters())
    assert torch.equal(net(x), before)
    assert model.seeds_not_dormant() == ()


def fossilized(net: nn.Module, *layer_ids: str) -> MorphableModel:
    model = esper.wrap(net, [nn.Linear, nn.Conv2d])
    for layer_id in layer_ids:
        grow(model, layer_id, S.FOSSILIZED)
    return model


def test_bake_keeps_what_has_grown_with_the_output_unchanged_and_exports() -> None:
    model = fossilized(mlp(), "2", "4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 6)
    before = model(x)
    with pytest.raises(ContractError, match=r"seed 2:0 is fossilized: bake\(\) keeps it"):
        model.unwrap()
    baked = esper.bake(model, optimizer)
    assert torch.equal(baked(x), before)
    assert isinstance(baked[2], nn.Linear)
    assert set(mlp().state_dict()) < set(baked.state_dict())
    assert {id(p) for p in baked.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    exported = torch.export.export(baked, (x,)).module()
    assert torch.equal(exported(x), before)
    saved = io.BytesIO()
    torch.save(baked, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(x), before)
    fresh = esper.bake(fossilized(mlp(), "2", "4"))
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(copy.deepcopy(baked).state_dict())
    assert torch.equal(fresh(x), before)
    again = esper.wrap(baked, ["0", "2"])
    assert torch.equal(again(x), before)
    grow(again, "2", S.FOSSILIZED)
    grown = again(x)
    assert not torch.equal(grown, before)
    assert torch.equal(again.bake()(x), grown)


def test_a_baked_encoder_keeps_its_fast_path_closed() -> None:
    model = fossilized(encoder(), "layers.0.self_attn", "layers.1.linear2").eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model.bake()(x), before)


def test_bake_refuses_a_seed_that_takes_part_and_is_not_permanent() -> None:
    model = fossilized(mlp(), "2")
    grow(model, "0")
    with pytest.raises(ContractError, match="seed 0:0 is evaluating: fossilize or cull it"):
        model.bake()
