"""Kernels: everything in the catalogue starts at exactly 0, costs what it says, and what is broken is refused."""

import hashlib
import json
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from esper.cli.app import app
from esper.errors import KernelError
from esper.kasmina.catalogue import CATALOGUE, MAX_PARAMETERS, cost_of
from esper.kasmina.kernels import build_kernel, load_grown, load_kernel, pack
from esper.kasmina.modules import BUILDERS, build_module
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind
from esper.services.urza.kernels.shipped_blueprints import SHIPPED

LARGE = {torch.float16: 1e3, torch.bfloat16: 1e15, torch.float32: 1e15, torch.float64: 1e150}
OPTIONS = {
    "low_rank": {"rank": 3},
    "bottleneck": {"expansion": 0.5},
    "residual": {"expansion": 0.5},
    "mlp": {"width": 5},
    "squeeze_excite": {"reduction": 4},
}
PAIRS = [(name, kind) for name, entry in CATALOGUE.items() for kind in entry.targets]
POSITIONS = {LayerKind.LINEAR: (), LayerKind.CONV1D: (7,), LayerKind.CONV2D: (3, 5)}
each_pair = pytest.mark.parametrize(("name", "kind"), PAIRS, ids=str)


def spec_of(name: str, kind: LayerKind) -> BlueprintSpec:
    return BlueprintSpec(module=name, parameters=OPTIONS.get(name, {}), targets=(kind,))


def built(name: str, kind: LayerKind, features: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_module(spec_of(name, kind), kind, features)


def outputs(kind: LayerKind, features: int, batch: tuple[int, ...] = (2,)) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*batch, features, *POSITIONS[kind])


def awakened(module: nn.Module) -> nn.Module:
    """Weights as after some training: nothing is zero any more."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_every_entry_can_be_built() -> None:
    assert set(BUILDERS) == set(CATALOGUE)


@given(
    pair=st.sampled_from(PAIRS),
    features=st.sampled_from([1, 3, 13, 64]),
    batch=st.sampled_from([(), (1,), (3,), (0,)]),
    dtype=st.sampled_from(list(LARGE)),
    is_channels_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_a_fresh_module_adds_exactly_nothing(
    pair: tuple[str, LayerKind],
    features: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    is_channels_last: bool,
    seed: int,
) -> None:
    name, kind = pair
    module = built(name, kind, features, seed).to(dtype)
    h = torch.randn(*batch, features, *POSITIONS[kind], dtype=dtype)
    flat = h.flatten()
    for n, value in enumerate((0.0, -0.0, LARGE[dtype], -LARGE[dtype])):
        flat[n : flat.numel() : 7] = value
    h = flat.reshape(h.shape)
    if is_channels_last and h.dim() == 4:
        h = h.to(memory_format=torch.channels_last)
    s = module(h)
    assert (s.shape, s.dtype) == (h.shape, h.dtype)
    assert torch.equal(s, torch.zeros_like(h))
    assert torch.equal(h + s, h)


@given(pair=st.sampled_from(PAIRS), features=st.sampled_from([1, 5, 16]), seed=st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_it_is_the_named_parameters_that_hold_it_at_nothing(
    pair: tuple[str, LayerKind], features: int, seed: int
) -> None:
    name, kind = pair
    module = awakened(built(name, kind, features, seed))
    with torch.no_grad():
        for held in CATALOGUE[name].starts_at_zero:
            module.get_parameter(held).zero_()
    assert not module(outputs(kind, features)).any()


@each_pair
def test_a_module_learns_and_gives_the_same_again(name: str, kind: LayerKind) -> None:
    module, h = built(name, kind, 8), outputs(kind, 8, (4,))
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.SGD([*parameters.values(), nn.Parameter(torch.zeros(()))], lr=0.5)
    for _step in range(3):
        optimizer.zero_grad()
        (h + module(h)).square().sum().backward() if parameters else None
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    assert not list(module.buffers())
    state = {n: p.clone() for n, p in module.state_dict().items()}
    s = module.train()(h)
    assert torch.equal(s, module.eval()(h))
    assert bool(s.any()) is bool(parameters)
    assert all(torch.equal(state[n], p) for n, p in module.state_dict().items())


@pytest.mark.parametrize("kind", list(LayerKind))
def test_an_output_without_a_batch_is_one_sample(kind: LayerKind) -> None:
    for name in (n for n, k in PAIRS if k is kind):
        module, h = awakened(built(name, kind, 6)), outputs(kind, 6, (2,))
        torch.testing.assert_close(module(h[0]), module(h)[0], msg=name)


def test_a_gate_of_a_linear_layer_does_not_mix_positions() -> None:
    module, h = awakened(built("squeeze_excite", LayerKind.LINEAR, 6)), torch.randn(2, 9, 6)
    changed = h.clone()
    changed[:, 5:] = 0.0
    assert torch.equal(module(h)[:, :5], module(changed)[:, :5]), "the past may not see the future"


@each_pair
def test_autocast_checkpoints_and_the_compiler_take_it(name: str, kind: LayerKind) -> None:
    module, h = awakened(built(name, kind, 6)), outputs(kind, 6).requires_grad_()

    def layer(h: Tensor) -> Tensor:
        return h + module(h)

    expected = layer(h)
    (wanted,) = torch.autograd.grad(expected.square().sum(), h, retain_graph=True)
    again = checkpoint(layer, h, use_reentrant=False)
    (gradient,) = torch.autograd.grad(again.square().sum(), h)
    assert torch.equal(again, expected)
    assert torch.equal(gradient, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(h).float(), expected, atol=0.2, rtol=0.1)
    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(h), expected, msg=backend)


@given(
    pair=st.sampled_from(PAIRS),
    features=st.integers(1, 300),
    positions=st.integers(1, 12),
    options=st.tuples(st.integers(1, 64), st.floats(0.01, 4.0)),
)
@settings(max_examples=200, deadline=None)
def test_the_cost_is_what_torch_counts(
    pair: tuple[str, LayerKind], features: int, positions: int, options: tuple[int, float]
) -> None:
    name, kind = pair
    chosen = {n: options[0] if o.is_whole else options[1] for n, o in CATALOGUE[name].options.items()}
    spec = BlueprintSpec(module=name, parameters=chosen, targets=(kind,))
    try:
        cost = cost_of(spec, kind, features)
    except KernelError as error:
        assume("choose a narrower" not in str(error))
        raise
    with torch.device("meta"):
        module = build_module(spec, kind, features)
        shape = {LayerKind.LINEAR: (positions, features), LayerKind.CONV1D: (1, features, positions)}
        h = torch.empty(shape.get(kind, (1, features, positions, 1)))
    with FlopCounterMode(display=False) as counter:
        module(h)
    assert cost.num_parameters == sum(p.numel() for p in module.parameters())
    assert cost.flops(positions) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("change", "features", "says"),
    [
        ({"module": "magic"}, 8, "no module 'magic'"),
        ({"targets": (LayerKind.CONV2D,)}, 8, "does not go into a linear layer"),
        ({"parameters": {}}, 8, r"takes \['rank'\], not \[\]"),
        ({"parameters": {"rank": 2, "more": 1}}, 8, "name just those"),
        ({"parameters": {"rank": 10**9}}, 8, "rank must be a whole number in 1..1024"),
        ({"parameters": {"rank": 2.5}}, 8, "rank must be a whole number"),
        ({"parameters": {"rank": 1024}}, 8, "choose a narrower blueprint"),
        ({}, 10**8, f"more than {MAX_PARAMETERS}: choose a smaller blueprint"),
        ({}, 0, "cannot have 0 features"),
        ({}, 2**31, "cannot have 2147483648 features"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused_before_it_is(change: dict[str, Any], features: int, says: str) -> None:
    spec = BlueprintSpec(module="low_rank", parameters={"rank": 2}, targets=(LayerKind.LINEAR,))
    with pytest.raises(KernelError, match=says):
        build_kernel("x", spec.model_copy(update=change), LayerKind.LINEAR, features)


@pytest.mark.parametrize("blueprint_id", list(SHIPPED))
def test_what_is_shipped_is_built_the_same_way_each_time_and_loads(blueprint_id: str) -> None:
    spec = SHIPPED[blueprint_id]
    for kind in spec.targets:
        data = build_kernel(blueprint_id, spec, kind, 12, seed=3)
        assert data == build_kernel(blueprint_id, spec, kind, 12, seed=3)
        kernel = load_kernel(data, digest(data))
        assert (kernel.blueprint_id, kernel.spec, kernel.kind, kernel.num_features) == (blueprint_id, spec, kind, 12)
        assert kernel.num_parameters == cost_of(spec, kind, 12).num_parameters
        assert not kernel.build()(outputs(kind, 12)).any()


def test_every_kind_of_layer_can_have_every_shipped_module_that_fits() -> None:
    shipped = {(spec.module, kind) for spec in SHIPPED.values() for kind in spec.targets}
    assert shipped == set(PAIRS)


def test_a_user_sees_what_fits_a_layer_and_what_it_costs() -> None:
    ran = CliRunner().invoke(app, ["blueprints", "--kind", "conv1d", "--features", "10", "--positions", "7"])
    assert ran.exit_code == 0
    rows = {cells[1].strip(): cells for cells in (line.split("│") for line in ran.output.splitlines()) if cells[1:]}
    assert [b for b in rows if b in SHIPPED] == [b for b, s in SHIPPED.items() if LayerKind.CONV1D in s.targets]
    assert [cell.strip() for cell in rows["residual-3"][3:5]] == ["620", f"{2 * 2 * 3 * 10 * 10 * 7:,}"]
    ran = CliRunner().invoke(app, ["blueprints", "--features", "5000"])
    assert "choose a smaller" in " ".join(ran.output.split())


LOW_RANK = SHIPPED["low-rank-4"]
DATA = build_kernel("low-rank-4", LOW_RANK, LayerKind.LINEAR, 6)
WEIGHTS = dict(load_kernel(DATA, digest(DATA)).weights)


def packed(**change: Any) -> bytes:
    """A kernel some of whose weights are others; None takes one away."""
    weights = {n: w for n, w in {**WEIGHTS, **change}.items() if w is not None}
    return pack("low-rank-4", LOW_RANK, LayerKind.LINEAR, 6, weights)


def described(**change: Any) -> bytes:
    """A kernel that says something else of itself."""
    header = json.loads(DATA[8 : 8 + int.from_bytes(DATA[:8], "little")])
    text = {**json.loads(header["__metadata__"]["esper"]), **change}
    return save(WEIGHTS, {"esper": json.dumps(text)})


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


REFUSED: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "a header of 0 bytes"),
    ("junk", b"\xff" * 64, "is malformed"),
    (
        "header too long",
        (2**63).to_bytes(8, "little") + DATA[8:],
        "is malformed: a header of 9223372036854775808 bytes",
    ),
    ("header bomb", with_header(b" " * 70_000 + b"{}"), "65536 at most"),
    ("nested header", with_header(b"[" * 60_000), "is malformed"),
    ("nested metadata", with_header(b'{"__metadata__":{"esper":"' + b"[" * 60_000 + b'"}}'), "is malformed"),
    ("endless number", with_header(b'{"__metadata__":{"esper":' + b"9" * 60_000 + b"}}"), "is malformed"),
    ("no metadata", save(WEIGHTS), "no metadata"),
    ("cut off", DATA[:-1], "is malformed"),
    ("longer", DATA + b"\0", "is malformed"),
    ("other format", described(format="esper-kernel-2"), "is malformed"),
    ("unknown field", described(code="import os"), "is malformed"),
    ("no such kind", described(kind="conv9d"), "is malformed"),
    ("spec is no spec", described(spec="[]"), "is malformed"),
    ("spec with a text", described(spec=LOW_RANK.model_dump_json().replace(":4", ':"4"')), "is malformed"),
    ("odd id", described(blueprint_id="../../x"), "is malformed"),
    ("width as text", described(num_features="six"), "is malformed"),
    ("no width", described(num_features="0"), "is malformed"),
    ("forged width", described(num_features="7"), "does not fit its spec"),
    ("huge width", described(num_features="999999999"), "choose a smaller blueprint"),
    ("missing tensor", packed(**{"1.weight": None}), "does not fit its spec"),
    ("extra tensor", packed(more=torch.zeros(1)), "does not fit its spec"),
    ("wrong shape", packed(**{"0.weight": torch.zeros(6, 4)}), "does not fit its spec"),
    ("empty tensor", packed(**{"0.weight": torch.zeros(0, 6)}), "does not fit its spec"),
    ("integers", packed(**{"0.weight": torch.zeros(4, 6, dtype=torch.int32)}), "weights of type I32, not F32"),
    ("complex", packed(**{"0.weight": torch.zeros(4, 6, dtype=torch.complex64)}), "weights of type C64"),
    ("half", packed(**{"0.weight": torch.zeros(4, 6, dtype=torch.float16)}), "weights of type F16"),
    ("not a number", packed(**{"0.weight": torch.full((4, 6), float("nan"))}), "not finite"),
    ("infinite", packed(**{"0.weight": torch.full((4, 6), float("-inf"))}), "not finite"),
    ("no identity", packed(**{"1.weight": torch.full((6, 4), 1e-30)}), "1.weight must be all zero"),
]


@pytest.mark.parametrize(("data", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_broken_kernel_is_refused_in_one_line_that_says_why(data: bytes, says: str) -> None:
    with pytest.raises(KernelError, match=says) as caught:
        load_kernel(data, digest(data))
    assert len(str(caught.value)) <= 300
    assert str(caught.value).isprintable()


def test_other_bytes_than_were_asked_for_are_refused() -> None:
    with pytest.raises(KernelError, match="fetch it again"):
        load_kernel(DATA, "ab" * 32)
    with pytest.raises(KernelError, match="more than 10"):
        load_kernel(DATA, digest(DATA), max_bytes=10)


def test_a_name_twice_in_the_header_is_refused() -> None:
    size = int.from_bytes(DATA[:8], "little")
    header = DATA[8 : 8 + size].rstrip()
    twice = header[:-1] + b',"1.weight":{"dtype":"F32","shape":[4,6],"data_offsets":[96,192]}}'
    for text in (twice, twice.replace(b"[4,6]", b"[6,4]")):
        data = with_header(text + b" " * (-len(text) % 8)) + DATA[8 + size :]
        try:
            kernel = load_kernel(data, digest(data))
        except KernelError:
            continue
        assert_sound(kernel.build())


@pytest.fixture(scope="module")
def no_large_allocation() -> Iterator[None]:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100 * 1024


def assert_sound(module: nn.Module) -> None:
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {n: tuple(w.shape) for n, w in WEIGHTS.items()}
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    assert not module(outputs(LayerKind.LINEAR, 6)).any()


@pytest.mark.usefixtures("no_large_allocation")
@given(place=st.integers(0, len(DATA) - 1), byte=st.integers(0, 255))
@settings(max_examples=1000, deadline=None)
def test_a_changed_byte_gives_a_refusal_or_a_kernel_that_is_sound(place: int, byte: int) -> None:
    changed = DATA[:place] + bytes([byte]) + DATA[place + 1 :]
    if changed != DATA:
        with pytest.raises(KernelError, match="fetch it again"):
            load_kernel(changed, digest(DATA))
    try:
        kernel = load_kernel(changed, digest(changed))  # whoever changed it gave its new name too
    except KernelError:
        assert changed != DATA
        return
    if kernel.num_features == 6 and kernel.spec.parameters == LOW_RANK.parameters:
        assert_sound(kernel.build())


HEADER_SIZE = int.from_bytes(DATA[:8], "little")


@pytest.mark.usefixtures("no_large_allocation")
@given(
    old=st.sampled_from([b"F32", b"[4,6]", b"[6,4]", b"[0,96]", b"[96,192]", b"0.weight", b'\\"6\\"', b"low_rank", b"4}"]),
    new=st.sampled_from(
        [b"F64", b"F8_E4M3", b"[6,4]", b"[2147483647,2147483647]", b"[-1]", b"[]", b"[0,9999999999999]", b"[96,0]",
         b"1.weight", b'\\"2147483647\\"', b"residual", b"1e308}", b"-1}", b"null", b"\\u0000", b"\xff"]
    ),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_forged_header_is_refused_without_memory_for_what_it_claims(old: bytes, new: bytes) -> None:
    header = DATA[8 : 8 + HEADER_SIZE].replace(old, new)
    assume(header != DATA[8 : 8 + HEADER_SIZE])
    data = with_header(header) + DATA[8 + HEADER_SIZE :]
    with pytest.raises(KernelError):
        load_kernel(data, digest(data))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_what_a_seed_became_comes_back_to_the_bit_even_when_it_is_sick(dtype: torch.dtype) -> None:
    weights = {n: torch.full_like(w, float("nan"), dtype=dtype) for n, w in WEIGHTS.items()}
    data = pack("low-rank-4", LOW_RANK, LayerKind.LINEAR, 6, weights)
    back = load_grown(data).build().state_dict()
    assert all(back[n].dtype == dtype and bool(back[n].isnan().all()) for n in weights)
    with pytest.raises(KernelError, match="weights of type"):
        load_kernel(data, digest(data))
    with pytest.raises(KernelError, match="type I64"):
        load_grown(packed(**{"0.weight": torch.zeros(4, 6, dtype=torch.int64)}))
