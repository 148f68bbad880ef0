"""Checks of one third-party model: seeds change nothing before they grow, and can be removed again.

Owns the list of checks. A check passes or returns the reason why not. What the plain model cannot do either (be
pickled, be differentiated) is no failure of its wrapped form.
"""

import copy
import hashlib
import inspect
import io
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from model_catalogues import Case, Inputs
from torch import Tensor, nn

import esper
from esper.errors import EsperError
from esper.kasmina.flow import record_flow
from esper.kasmina.hosts import host_type
from esper.kasmina.kernels import LoadedKernel, build_kernel, load_kernel
from esper.kasmina.lifecycle import StageSchedule
from esper.kasmina.model import MorphableModel
from esper.kasmina.state import SeedArrays
from esper.kasmina.topology import topology_of
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import SeedStage

ALL_STAGES_ONE_BOUNDARY = StageSchedule(germinated=1, training=1, grafting=1, stabilizing=1, evaluating=9, embargo=1)
MAX_COPIED_PARAMETERS = 120_000_000  # parameters; larger models are neither copied nor pickled, to save memory


def is_host(_name: str, module: nn.Module) -> bool:
    """Whether a layer has a type that can hold seeds."""
    return host_type(module) is not None


class Unsuited(Exception):
    """The plain model does not run on this machine."""


def examine(case: Case, wrap: Callable[..., Any] = esper.wrap) -> Iterator[tuple[str, str]]:
    """Yield (check, verdict): "ok", "plain too" if the plain model fails too, or the reason of the failure.

    Raises:
        Unsuited: the model could not be built or fed.
    """
    if case.must_be_refused:
        yield "refused", _refusal(case, wrap)
        return
    model, inputs = _running_model(case)
    subject = Subject(model, inputs)
    yield "parameters", str(sum(p.numel() for p in model.parameters()))
    yield from subject.checks(wrap)


def _refusal(case: Case, wrap: Callable[..., Any]) -> str:
    model = case.builds[0]()
    try:
        wrap(model, target_layers=is_host)
    except (EsperError, TypeError) as error:
        return "ok" if "quantized" in str(error) else f"the error of the refusal gives no reason: {error}"
    return "a quantized model was not refused"


def _running_model(case: Case) -> tuple[nn.Module, Inputs]:
    reasons = []
    for build in case.builds:
        try:
            torch.manual_seed(0)
            model = build()
        except Exception as error:  # third-party code may raise anything
            reasons.append(f"build: {_short(error)}")
            continue
        torch.manual_seed(1)
        for inputs in case.inputs(model):
            try:
                with torch.no_grad():
                    outputs = tensors_in(call(model.train(), inputs))
                if any(t.is_floating_point() for t in outputs):
                    return model, inputs
            except Exception as error:  # likewise
                reasons.append(f"{type(error).__name__}: {_short(error)}")
    raise Unsuited(reasons[0] if reasons else "no known input fits")


class Subject:
    """A third-party model with its inputs, and its outputs before it is wrapped."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.is_small = sum(p.numel() for p in model.parameters()) <= MAX_COPIED_PARAMETERS
        self.buffers = {_plain(n): b.detach().clone() for n, b in model.named_buffers()}
        self.keys = list(model.state_dict())
        self.classes = [type(m) for m in model.modules()]
        self.called = _called(model, inputs)
        self.plain = self._run(model)  # some models set attributes in forward; compare what later calls return
        self.attributes = [set(vars(m)) for m in model.modules()]
        self.is_deterministic = _same(self.plain, self._run(model)) == "ok"
        self.now = self.plain  # the expected outputs

    def checks(self, wrap: Callable[..., Any]) -> Iterator[tuple[str, str]]:
        """See ``examine``."""
        model = wrap(self.model, target_layers=is_host)
        if not isinstance(model, MorphableModel):  # wrapped by replacement: compared while dormant
            yield from self._while_dormant(model)
            return
        yield "layers", str(len(model.layers))
        reached = [n for n, h in model.layers.items() if self.called.get(id(h.module))]
        yield "reached", str(len(reached))
        yield from self._while_dormant(model)
        yield "flow", self._attempt(self._recorded, model, reached)
        if reached:
            layer_id = self._one_that_matters(model, reached)
            yield "health", self._attempt(self._measured, model, reached)
            yield "isolation", self._attempt(self._isolated, model, layer_id)
            yield "growth", self._attempt(self._grown, model, layer_id)
            if self.is_small:
                yield "awake copy", self._attempt(self._copied, model, copy.deepcopy)
                yield "awake pickle", self._attempt(self._copied, model, _pickled)
            yield "checkpoint", self._attempt(self._resumed, model, layer_id)
            yield "bake", self._attempt(self._baked, model, layer_id)
        yield "unwrap", self._attempt(self._unwrapped, model)

    def _while_dormant(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        for part in ("forward", "gradients"):
            yield part, self._attempt(self._unchanged, model, part)
        yield "state_dict", self._attempt(self._interchange, model)
        if self.is_small:
            yield "copy", self._attempt(self._copied, model, copy.deepcopy)
            yield "pickle", self._attempt(self._copied, model, _pickled)

    # -- the checks ---------------------------------------------------------------------------

    def _unchanged(self, model: nn.Module, part: str) -> str:
        if part == "forward":
            self.dormant = self._run(model)
        return _same({part: self.plain[part]}, {part: self.dormant[part]}, self.is_deterministic)

    def _interchange(self, model: nn.Module) -> str:
        saved = model.state_dict()
        if list(saved) != self.keys:
            return "keys differ from those of the plain model"
        self.model.load_state_dict(saved)
        model.load_state_dict(self.model.state_dict())
        return "ok"

    def _copied(self, model: nn.Module, copied: Callable[[Any], Any]) -> str:
        try:
            copied(self.model)
        except Exception:  # then the wrapped form is not checked
            return "plain too"
        twin = copied(model)
        shared = {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
        if shared:
            return "the copy shares parameters"
        return _same(self.now, self._run(twin), self.is_deterministic)

    def _recorded(self, model: MorphableModel, reached: Sequence[str]) -> str:
        """Recording on the inputs finds the called layers, and no data flow that tracing does not find, where tracing works."""
        layers = {n: h.module for n, h in model.layers.items()}
        traced = topology_of(model.host, layers)
        _seed(7)
        flow = record_flow(model.host, layers, _as_example(model.host, copy.deepcopy(self.inputs)))
        if flow.reached != set(reached):
            return f"called layers differ: {sorted(flow.reached ^ set(reached))[:3]}"
        beyond = {(a, b) for a, b in flow.edges if a != b} - {(e.source, e.target) for e in traced.edges}
        if beyond and not traced.chained:
            return f"edges that tracing does not find: {sorted(beyond)[:3]}"
        return _same(self.plain, self._run(model), self.is_deterministic)

    def _measured(self, model: MorphableModel, reached: Sequence[str]) -> str:
        model.probe.arm()
        self._run(model)
        model.probe.collect(1, 0)
        ((_step, _epoch, signals),) = model.probe.drain()
        missing = set(reached) - set(signals)
        return f"no health signal of {sorted(missing)[:3]}" if missing else "ok"

    def _isolated(self, model: MorphableModel, layer_id: str) -> str:
        self._germinate(model, layer_id)
        for _stage in (SeedStage.GERMINATED, SeedStage.TRAINING):
            self._perturb(model)
            found = _same(self.plain, self._run(model), self.is_deterministic)
            if found != "ok":
                return f"{_stage}: {found}"
            self._advance(model)
        return "ok"

    def _grown(self, model: MorphableModel, layer_id: str) -> str:
        while model.seed(layer_id, 0).stage is not SeedStage.EVALUATING:
            self._advance(model)
        self._perturb(model)
        grown = self._run(model)
        (seed,) = model.layers[layer_id].awake.values()
        if seed.breaker.detail:
            return f"the seed failed: {seed.breaker.detail}"
        if _same({"forward": self.plain["forward"]}, {"forward": grown["forward"]}) == "ok":
            return "the seed has no effect"
        parameters = [p for p in seed.module.parameters() if p.grad is not None]
        if not parameters and any(p.requires_grad for p in model.host.parameters()):
            return "the seed has no gradient"
        optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
        if optimizer is not None:
            optimizer.step()
        self.now = self._run(model)
        return "ok" if list(model.state_dict()) == self.keys else "keys differ when grown"

    def _resumed(self, model: MorphableModel, layer_id: str) -> str:
        saved = io.BytesIO()
        torch.save(model.seed_state(), saved)
        saved.seek(0)
        stage = model.seed(layer_id, 0)
        model.apply_transition(model.plan_cull(layer_id, 0), step=90, boundary=90)
        dormant = _same(self.plain, self._run(model), self.is_deterministic)
        if dormant != "ok":
            return f"after culling: {dormant}"
        model.load_seed_state(torch.load(saved, weights_only=True))
        if model.seed(layer_id, 0) != stage:
            return "the restored seed differs"
        return _same(self.now, self._run(model), self.is_deterministic)

    def _baked(self, model: MorphableModel, layer_id: str) -> str:
        model.apply_transition(model.plan_fossilize(layer_id, 0), step=91, boundary=91)
        try:
            esper.unwrap(model)
        except EsperError:
            pass
        else:
            return "unwrap() dropped a fossilized seed"
        if not self.is_small:
            return "ok"
        baked = esper.bake(copy.deepcopy(model))
        if any("kasmina.layer" in c.__module__ for m in baked.modules() for c in type(m).__mro__):
            return "a Kasmina class remains"
        found = self._run(baked)
        found["gradients"] = {n: g for n, g in found["gradients"].items() if ".grown." not in f".{n}"}
        return _same(self.now, found, self.is_deterministic)

    def _unwrapped(self, model: MorphableModel) -> str:
        for seed in model.seeds_not_dormant():  # bake() ran on a copy; here they are dropped
            model.state.load_lists(SeedArrays(*model.state.stage.shape).to_lists())
            model.follow_state(model.layers[seed.layer_id], seed.seed_id)
        plain = esper.unwrap(model)
        if plain is not self.model:
            return "unwrap() returned another object"
        if [type(m) for m in plain.modules()] != self.classes:
            return "Kasmina classes remain"
        left = [set(vars(m)) - had for m, had in zip(plain.modules(), self.attributes, strict=True)]
        if any(left):
            return f"attributes remain: {set().union(*left)}"
        return _same(self.plain, self._run(plain), self.is_deterministic)

    def _one_that_matters(self, model: MorphableModel, reached: Sequence[str]) -> str:
        """A middle layer that the outputs depend on, since parts of random models are dead."""
        moved = {n.rpartition(".")[0] for n, g in self.plain["gradients"].items() if bool(g.count_nonzero())}
        places = {id(m): n for n, m in model.host.named_modules()}
        alive = [n for n in reached if any(m.startswith(places[id(model.layers[n].module)]) for m in moved)]
        found = alive or reached
        return found[len(found) // 2]

    # -- helpers ------------------------------------------------------------------------------

    def _attempt(self, check: Callable[..., str], *args: Any) -> str:
        try:
            return check(*args)
        except Exception as error:  # a failed check is a line of the table, whatever it raised
            return f"{type(error).__name__}: {_short(error)}"

    def _run(self, model: nn.Module) -> dict[str, Any]:
        with torch.no_grad():  # parameters do not change here; buffers do, in training mode
            for name, buffer in model.named_buffers():
                start = self.buffers.get(_plain(name))
                if start is not None and start.shape == buffer.shape:
                    buffer.copy_(start)
        model.zero_grad()
        _seed(7)
        outputs = tensors_in(call(model.train(), self.inputs))
        loss = sum((t.float() + 1.0).square().mean() for t in outputs if t.requires_grad)  # zeros have a gradient too
        if isinstance(loss, Tensor):
            loss.backward()
        host = model.host if isinstance(model, MorphableModel) else model
        kept = torch.clone if self.is_small else _digest
        gradients = {_plain(n): kept(p.grad) for n, p in host.named_parameters() if p.grad is not None}
        return {"forward": [t.detach() for t in outputs], "gradients": gradients}

    def _germinate(self, model: MorphableModel, layer_id: str) -> None:
        model.schedule = ALL_STAGES_ONE_BOUNDARY
        handle = model.layers[layer_id]
        kernel = small_kernel(handle)
        model.apply_transition(model.plan_germinate(layer_id, 0, kernel), step=0, boundary=0, kernel=kernel)
        self._boundary = 0

    def _advance(self, model: MorphableModel) -> None:
        self._boundary += 1
        for plan in model.plan_advance(self._boundary):
            model.apply_transition(plan, step=self._boundary, boundary=self._boundary)

    def _perturb(self, model: MorphableModel) -> None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for handle in model.layers.values():
                for seed in handle.awake.values():
                    for p in seed.module.parameters():
                        p.copy_(torch.randn(p.shape, generator=generator).to(p) * 0.05)


def small_kernel(handle: Any) -> LoadedKernel:
    """A small kernel with biases, so that it also affects a layer that returns only zeros."""
    spec = BlueprintSpec(module="bottleneck", parameters={"expansion": 0.02}, targets=(handle.kind,))
    data = build_kernel("bottleneck-2", spec, handle.kind, handle.num_features)
    return load_kernel(data, hashlib.sha256(data).hexdigest())


def _as_example(model: nn.Module, inputs: Inputs) -> Any:
    args, kwargs = inputs
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs if kwargs else args


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Outputs of the model. The inputs are cloned, since some models write into them."""
    args, kwargs = copy.deepcopy(inputs)
    return model(*args, **kwargs)


def tensors_in(outputs: Any) -> list[Tensor]:
    """All tensors in what a forward returned, in a fixed order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return [t for value in outputs.values() for t in tensors_in(value)]
    if isinstance(outputs, list | tuple):
        return [t for value in outputs for t in tensors_in(value)]
    return []


def _same(before: Mapping[str, Any], after: Mapping[str, Any], to_the_bit: bool = True) -> str:
    for part, values in before.items():
        others = after[part]
        pairs = [(n, values[n], others.get(n)) for n in values] if part == "gradients" else None
        if len(values) != len(others):
            return f"{part}: {len(others)} tensors, not {len(values)}"
        for name, a, b in pairs or [(str(n), a, b) for n, (a, b) in enumerate(zip(values, others, strict=True))]:
            if b is None or a.shape != b.shape or a.dtype != b.dtype:
                return f"{part}: {name} has another shape or type"
            is_same = torch.equal(a, b) if to_the_bit else torch.allclose(a, b, 1e-3, 1e-3, equal_nan=True)
            if not is_same and not (
                a.is_floating_point()
                and torch.equal(a.isnan(), b.isnan())
                and torch.equal(a[~a.isnan()], b[~b.isnan()])
            ):
                return f"{part}: {name} differs"
    return "ok"


def _seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # the random generator of third-party models
    random.seed(number)


def _plain(name: str) -> str:
    return name.removeprefix("host.").replace(".host.", ".")  # wrapped by replacement, layers are one level deeper


def _digest(values: Tensor) -> Tensor:
    """Digest of a large tensor: tensors with equal digests are almost surely equal bit by bit."""
    bits = values.detach().float().contiguous().view(torch.int32).flatten().long()
    return torch.stack((bits.sum(), (bits * torch.arange(1, bits.numel() + 1)).sum()))


def _called(model: nn.Module, inputs: Inputs) -> dict[int, int]:
    counts: dict[int, int] = {}

    def count(module: nn.Module, _args: Any, output: Any) -> None:
        if any(t.numel() for t in tensors_in(output)):  # an expert may get no token
            counts[id(module)] = counts.get(id(module), 0) + 1

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.no_grad():
        call(model, inputs)
    for hook in hooks:
        hook.remove()
    return counts


def _pickled(model: nn.Module) -> nn.Module:
    saved = io.BytesIO()
    torch.save(model, saved, pickle_module=pickle)
    saved.seek(0)
    return torch.load(saved, weights_only=False)  # type: ignore[no-any-return]


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
