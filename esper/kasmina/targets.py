"""Which layers of a model get seeds: those that were asked for, less those that cannot hold any.

Owns the meaning of ``target_layers``. A target is

    a class          nn.Linear            its instances and those of its subclasses
    a str            "encoder.*.fc1"      qualified names, as fnmatch reads them
    a compiled re    re.compile(r"fc\\d")  qualified names, matched in full
    a predicate      (name, module) -> bool

Classes, patterns and predicates are general: what cannot hold seeds is skipped, with the reason.
A name in full is a demand: it is met, or refused. Names are those of ``named_modules``, without
the ``_orig_mod`` of torch.compile; a module under two names goes by the first.

Invariant: each layer found is called by its parent, has a width, and has weights of floating point.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from esper.errors import ContractError
from esper.kasmina.bypass import children_read_only
from esper.kasmina.hosts import host_type

Target = type[nn.Module] | str | re.Pattern[str] | Callable[[str, nn.Module], bool]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WILDCARDS = frozenset("*?[")
_MAX_REASONS = 3  # shown in one message


@dataclass(frozen=True)
class Targets:
    """``layers``: qualified name -> module, in the model's order. ``skipped``: name -> why it holds no seeds."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def find_targets(model: nn.Module, targets: Target | Sequence[Target]) -> Targets:
    """The layers of ``model`` that ``targets`` ask for.

    Raises:
        ContractError: nothing was found that can hold seeds; a name or pattern fits no module; a
            layer that was named in full cannot hold seeds; a layer is lazy and has no shape yet.
        TypeError: a class was asked for whose instances cannot hold seeds, and nothing else was found.
    """
    wanted = _as_sequence(targets)
    names = {id(m): _plain(name) or type(model).__name__ for name, m in model.named_modules()}
    modules = {names[id(m)]: m for m in model.modules()}
    demanded = _check_names(wanted, list(modules), type(model).__name__)
    parents = _parents(model)
    chosen: set[str] = set()
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        if not any(_fits(target, name, module) for target in wanted):
            continue
        holder, reason = _holder(module, parents.get(id(module), []))
        if holder is not None:
            chosen.add(names[id(holder)])
        elif name in demanded:
            raise ContractError(f"{name} cannot hold seeds: {reason}")
        elif not module._modules or host_type(module) is not None:  # a container is no layer
            skipped[name] = reason
    if not chosen:
        _refuse(model, wanted, skipped)
    return Targets({n: m for n, m in modules.items() if n in chosen}, skipped)


def _as_sequence(targets: Target | Sequence[Target]) -> tuple[Target, ...]:
    listed = [targets] if isinstance(targets, str | re.Pattern | type) or callable(targets) else targets
    if not isinstance(listed, Iterable) or not (wanted := tuple(listed)):
        raise ContractError(f"target_layers is {targets!r}: give classes, names, patterns or predicates")
    for target in wanted:
        if isinstance(target, nn.Module):
            raise ContractError(f"target_layers has a module: give its class, {type(target).__name__}, or its name")
        if not isinstance(target, str | re.Pattern | type) and not callable(target):
            raise ContractError(f"target_layers has {target!r}: give classes, names, patterns or predicates")
    return wanted


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _fits(target: Target, name: str, module: nn.Module) -> bool:
    if isinstance(target, type):
        return isinstance(module, target)
    if isinstance(target, str):
        return fnmatchcase(name, target)
    if isinstance(target, re.Pattern):
        return target.fullmatch(name) is not None
    return bool(target(name, module))


def _check_names(wanted: Iterable[Target], names: Sequence[str], model: str) -> set[str]:
    """The names that were given in full; a name or pattern that fits nothing is a mistake."""
    demanded = set()
    for target in wanted:
        if isinstance(target, str) and not _WILDCARDS & set(target):
            if target not in names:
                near = difflib.get_close_matches(target, names, 1)
                raise ContractError(
                    f"{model} has no module {target!r}" + (f": did you mean {near[0]!r}?" if near else "")
                )
            demanded.add(target)
        elif isinstance(target, str | re.Pattern) and not any(_fits(target, name, nn.Identity()) for name in names):
            raise ContractError(f"{model} has no module whose name fits {_text(target)}")
    return demanded


def _parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, attribute))
    return found


def _holder(module: nn.Module, parents: Sequence[tuple[nn.Module, str]]) -> tuple[nn.Module | None, str]:
    """The module whose output gets the seeds, the layer itself as a rule; or None, and why there is none.

    A layer that all its parents go around passes its seeds on to a parent that can hold them.
    """
    reason = _why_not(module)
    if reason:
        return None, reason
    if not parents or not all(attribute in children_read_only(type(p)) for p, attribute in parents):
        return module, ""
    for parent, _attribute in parents:
        if host_type(parent) is not None and not _why_not(parent):
            return parent, ""
    return None, f"{type(parents[0][0]).__name__} reads its weight and never calls it"


def _why_not(module: nn.Module) -> str:
    host = host_type(module)
    if host is None:
        kind = "it is quantized, and " if _is_quantized(module) else ""
        return f"{kind}{type(module).__name__} cannot hold seeds"
    own = {n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if any(is_lazy(t) for t in own.values()):
        raise ContractError("the model has lazy layers without a shape: run one forward pass before wrap()")
    weights = [own["weight"]] if "weight" in own else list(own.values())
    if weights and not any(_is_plain_float(w) for w in weights):
        dtype = str(weights[0].dtype).removeprefix("torch.")
        return (
            f"its weight is {type(weights[0]).__name__} of {dtype}: quantized, sharded and complex layers cannot grow"
        )
    if host.num_features(module) < 1:
        return "its output has no features"
    return ""


def _is_quantized(module: nn.Module) -> bool:
    return "quantized" in type(module).__module__.split(".")


def _is_plain_float(weight: Tensor) -> bool:
    return weight.dtype in _FLOATS and not is_traceable_wrapper_subclass(weight)


def _refuse(model: nn.Module, wanted: Sequence[Target], skipped: dict[str, str]) -> None:
    called = type(model).__name__
    asked = ", ".join(map(_text, wanted))
    quantized = [n for n, m in model.named_modules() if _is_quantized(m)]
    if skipped:
        shown = "; ".join(f"{n}: {reason}" for n, reason in list(skipped.items())[:_MAX_REASONS])
        is_class = all(reason.endswith("cannot hold seeds") for reason in skipped.values())
        raise (TypeError if is_class else ContractError)(f"no layer of {asked} in {called} can hold seeds ({shown})")
    if quantized:
        raise ContractError(
            f"{called} is quantized ({quantized[0]} and {len(quantized) - 1} more), and quantized layers cannot grow: "
            "wrap the float model, quantize what bake() gives"
        )
    raise ContractError(f"{called} has no layer of {asked}: name others in target_layers")


def _text(target: Target) -> str:
    if isinstance(target, str):
        return repr(target)
    return repr(target.pattern) if isinstance(target, re.Pattern) else getattr(target, "__name__", repr(target))
