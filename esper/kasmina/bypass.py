"""Parents that go around a layer: they read its weight and never call it, so a seed in it would do nothing.

Two sorts are known:

- Always. ``nn.MultiheadAttention`` hands ``out_proj.weight`` to a function. Which children a parent
  treats so is read from the bytecode of its forward, once a class.
- Sometimes. ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` take a fast path in
  evaluation that reads all their weights at once. It stays open while all seeds inside are
  dormant, and is closed for that one module while a seed inside is awake.

Invariant: a layer that holds an awake seed is called.
"""

import dis
import inspect
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

from torch import nn

_READ = frozenset({"weight", "bias", "in_proj_weight", "in_proj_bias"})
_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
"""Who has a fast path, and the attribute that its forward asks first; false closes it and changes nothing else."""

_OPEN = "_kasmina_fast_path"  # on a module whose path is closed: what its switch was
_read_only: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def children_read_only(parent: type[nn.Module]) -> frozenset[str]:
    """Attributes of a module whose weight or bias its forward reads and which it uses in no other way."""
    if parent not in _read_only:
        read: set[str] = set()
        used: set[str] = set()
        for code in _reachable(parent):
            for name, reading in _uses_of_self(code, code.co_varnames[0] if code.co_argcount else ""):
                (read if reading else used).add(name)
        _read_only[parent] = frozenset(read - used)
    return _read_only[parent]


def fast_path_owners(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules inside ``model`` that have a fast path around their layers."""
    return tuple(m for m in model.modules() if isinstance(m, tuple(_SWITCHES)))


def close_fast_paths(owners: Collection[nn.Module], awake: Collection[nn.Module], *, for_good: bool = False) -> None:
    """Close the path of each owner that holds an awake layer, and open again those that hold none.

    Idempotent. Closed paths stay closed through deepcopy and pickle; ``for_good`` means that
    they are not opened again, either.
    """
    for owner in owners:
        is_closed = _OPEN in vars(owner)
        must_close = any(m is a for m in owner.modules() for a in awake)
        switch = next(name for cls, name in _SWITCHES.items() if isinstance(owner, cls))
        if must_close and not is_closed:
            setattr(owner, _OPEN, getattr(owner, switch, False))
            setattr(owner, switch, False)
        elif is_closed and not must_close:
            setattr(owner, switch, vars(owner).pop(_OPEN))
        if must_close and for_good:
            delattr(owner, _OPEN)


def _reachable(cls: type[nn.Module]) -> Iterator[CodeType]:
    """The code of a class's forward, and of the methods that it names, and so on; of its bases' too."""
    own = cls.__mro__[: cls.__mro__.index(nn.Module)]
    pending, seen = ["forward"], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in own:
            method = inspect.unwrap(vars(base)[name]) if callable(vars(base).get(name)) else None
            if isinstance(method, FunctionType):
                yield method.__code__
                pending.extend(n for code in (method.__code__, *_inner(method.__code__)) for n in code.co_names)


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def _uses_of_self(code: CodeType, self_name: str) -> Iterator[tuple[str, bool]]:
    """Each attribute of ``self`` that the code loads, and whether only a weight or bias of it is taken."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    for at, step in enumerate(steps[1:-1], 1):
        before, after = steps[at - 1], steps[at + 1]
        loaded = before.argval if isinstance(before.argval, tuple) else (before.argval,)  # 3.13 loads two at once
        loads_self = before.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded[-1] == self_name
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and loads_self:
            is_called = step.opname == "LOAD_METHOD" or "NULL" in step.argrepr
            yield step.argval, not is_called and after.opname == "LOAD_ATTR" and after.argval in _READ
    for function in _inner(code):  # a lambda or a comprehension
        if self_name in function.co_freevars:
            yield from _uses_of_self(function, self_name)
