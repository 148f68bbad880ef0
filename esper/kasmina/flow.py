"""How data flows between layers, seen in one run on example inputs: for models that torch.fx cannot trace.

Hooks on the modules say which tensors go into a layer and come out of it; a TorchFunctionMode
follows them through everything between: each tensor knows the layers whose outputs it was made
of. What passes through numbers or arrays inside a module flows through that module whole.

Invariant: the model is as it was afterwards: attributes, buffers, gradients and random numbers.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from esper.errors import ContractError
from esper.kasmina.stance import hold_eager, let_go
from esper.kasmina.undoing import undone

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One forward's arguments: a tensor alone, positional ones, or keywords."""

Edge = tuple[str, str]
Sources = MutableMapping[Tensor, frozenset[str]]
_NOWHERE = frozenset[str]()
_WRITES = frozenset({"__setitem__", "__set__"})  # change their first argument and give nothing back


class Flow(NamedTuple):
    """What one run showed: (source, target) for each flow between layers, and the layers that were called."""

    edges: set[Edge]
    reached: set[str]


def record_flow(root: nn.Module, layers: Mapping[str, nn.Module], example: ExampleInputs) -> Flow:
    """The flow between ``layers`` in one forward of ``root``, as it stands (train or eval).

    Only what this run takes is seen: a branch that the example does not reach has no edges.

    Raises:
        ContractError: the model does not run on ``example``.
    """
    args, kwargs = _arguments(example)
    recorder = _Recorder({id(module): name for name, module in layers.items()})
    with ExitStack() as stack:
        stack.callback(let_go, hold_eager())
        stack.enter_context(undone(list(root.modules()), _devices(root)))
        stack.enter_context(_buffers_kept(root))
        stack.enter_context(recorder.watching(root))
        stack.enter_context(torch.enable_grad())  # as in a step of training: no fast path for inference
        try:
            with recorder:
                root(*args, **kwargs)
        except Exception as error:
            raise ContractError(
                f"{type(root).__name__} does not run on example_inputs ({type(error).__name__}: {error}): give a "
                "tensor, a tuple of arguments or a mapping of keywords, on the model's device"
            ) from error
    return recorder.flow


class _Recorder(TorchFunctionMode):
    """Follows the tensors of one thread from layer to layer."""

    def __init__(self, layer_ids: Mapping[int, str]) -> None:
        super().__init__()
        self.flow = Flow(set(), set())
        self._layer_ids = layer_ids
        self._made_of: Sources = WeakTensorKeyDictionary()  # tensor -> the layers that it was made of
        self._written: Sources = WeakTensorKeyDictionary()  # base -> the layers written into it or a view of it
        self._thread = threading.get_ident()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation: what it gives is made of what it takes."""
        result = func(*args, **(kwargs or {}))
        taken = _tensors((args, kwargs))
        reaching = self._sources(taken)
        given = _tensors(result)
        if not given and taken and getattr(func, "__name__", "") in _WRITES:
            given = taken[:1]
        for tensor in given:
            self._made_of[tensor] = reaching
            if any(tensor is t for t in taken):
                base = _base(tensor)
                self._written[base] = self._written.get(base, _NOWHERE) | reaching
        return result

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[None]:
        """See the calls of all modules."""
        handles: list[RemovableHandle] = []
        try:
            for module in root.modules():
                if id(module) in self._layer_ids:
                    handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        target = self._layer_ids[id(module)]
        self.flow.reached.add(target)
        with torch._C.DisableTorchFunction():
            self.flow.edges.update((source, target) for source in self._sources(_tensors((args, kwargs))))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        layer_id = self._layer_ids.get(id(module))
        with torch._C.DisableTorchFunction():
            for tensor in _tensors(result):
                if layer_id is not None:
                    self._made_of[tensor] = frozenset({layer_id})
                    self._written.pop(_base(tensor), None)
                elif tensor not in self._made_of:
                    self._made_of[tensor] = self._sources(_tensors((args, kwargs)))

    def _sources(self, tensors: Sequence[Tensor]) -> frozenset[str]:
        """The layers that these were made of."""
        found = _NOWHERE
        for tensor in tensors:
            found |= self._made_of.get(tensor, _NOWHERE) | self._written.get(_base(tensor), _NOWHERE)
        return found


def _arguments(example: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise ContractError(
        f"example_inputs is {type(example).__name__}: give a tensor, a tuple of arguments or a mapping of keywords"
    )


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _base(tensor: Tensor) -> Tensor:
    """The tensor that this is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _devices(root: nn.Module) -> list[torch.device]:
    return list({t.device for t in (*root.parameters(), *root.buffers()) if t.device.type == "cuda"})


@contextmanager
def _buffers_kept(root: nn.Module) -> Iterator[None]:
    """Buffers hold what they held: a forward in training writes into those of a batch norm."""
    before = [(buffer, buffer.detach().clone()) for buffer in root.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                buffer.copy_(kept)
