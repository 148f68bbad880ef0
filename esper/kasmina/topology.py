"""How data flows between the layers that hold seeds: traced by torch.fx where it can, recorded or guessed elsewhere.

The model's forward is run on proxies, once, without inputs. A part whose forward cannot be run
so (it looks at values) becomes a chain of its layers in the order of registration; the rest of
the graph stays as traced. Given example inputs, the flow is recorded in a real run instead (flow.py).

Invariant: the model is as it was afterwards: attributes, buffers and random numbers.
Other threads may run models meanwhile, though not compiled ones: torch refuses those while fx traces.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.kasmina.flow import Edge, ExampleInputs, record_flow
from esper.kasmina.undoing import undone
from esper.schemas.assets import LayerEdge

MAX_NODES = 20_000
"""A forward that takes more operations (a loop over many time steps) is not traced further: about 1 s."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The edges between layers, and where they are guesses.

    Attributes:
        edges: sorted, no loops.
        chained: the modules (name, "" for the model itself) whose forward could not be traced: each is
            taken as the chain of its layers, in the order of registration.
        unreached: the layers that the run on the example inputs did not call: they have no edges.
    """

    edges: tuple[LayerEdge, ...]
    chained: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()


def topology_of(model: nn.Module, layers: Mapping[str, nn.Module], example: ExampleInputs | None = None) -> Topology:
    """How data flows among ``layers`` (layer id -> module), through modules that are not in it.

    Traced; where that does not do, recorded in a run on ``example``; without one, guessed.

    Raises:
        ContractError: the model does not run on ``example``.
    """
    root = getattr(model, "_orig_mod", model)  # what torch.compile was given
    edges, chained = _traced(root, layers) if len(layers) > 1 else (set[Edge](), ())
    unreached: list[str] = []
    if chained and example is not None:
        edges, reached = record_flow(root, layers, example)
        chained, unreached = (), [name for name in layers if name not in reached]
    told = tuple(LayerEdge(source=a, target=b) for a, b in sorted(edges) if a != b)
    return Topology(told, chained, tuple(unreached))


def _traced(root: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[set[Edge], tuple[str, ...]]:
    tracer = _Tracer(root, {id(module): name for name, module in layers.items()})
    try:
        with undone(tracer.containers()), torch.no_grad():
            graph = tracer.trace(root, _defaults(root.forward))
        return set(tracer.edges_of(graph)), tuple(sorted(tracer.chains))
    except Exception:  # whatever a foreign forward() raises when it is traced
        return set(pairwise(layers)), ("",)


_ABOUT_SHAPE = frozenset(
    {"shape", "size", "ndim", "dim", "numel", "stride", "dtype", "device", "is_cuda", "requires_grad"}
)


class _TooLargeError(Exception):
    """The forward takes more than MAX_NODES operations."""


class _Tracer(fx.Tracer):
    """Looks only inside modules that contain layers; keeps no constant on the model; one thread's calls are seen."""

    def __init__(self, root: nn.Module, layer_ids: Mapping[int, str]) -> None:
        super().__init__()
        self._layer_ids = layer_ids
        self._inside = _layers_inside(root, layer_ids)
        self._paths: dict[int, str] = {id(m): name for name, m in root.named_modules()}
        self.chains: dict[str, list[str]] = {}  # path of a module that could not be traced -> its layers
        self._thread = threading.get_ident()

    def containers(self) -> list[nn.Module]:
        """The modules whose forward is run."""
        return [m for m, inside in self._inside.values() if inside]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether tracing does not look inside."""
        return id(m) in self._layer_ids or not self._inside[id(m)][1]

    def path_of_module(self, mod: nn.Module) -> str:
        """The first name of a module."""
        return self._paths[id(mod)]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of any module while this tracer is at work, in any thread and any model."""
        if threading.get_ident() != self._thread or id(m) not in self._inside:
            return forward(*args, **kwargs)
        before, depth = len(self.graph.nodes), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _TooLargeError:
            raise
        except Exception:  # this forward looks at values: its layers are taken in their order
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            while len(self.module_stack) > depth:  # fx leaves them there where a forward raises
                self.module_stack.popitem()
            self.chains[self.path_of_module(m)] = self._inside[id(m)][1]
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters are read as they are, buffers as copies: a forward may count in them."""
        is_ours = threading.get_ident() == self._thread
        is_buffer = isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter)
        return attr_val.clone() if is_ours and is_buffer else attr_val

    def create_arg(self, a: Any) -> Any:
        """Constants are dropped: only what flows counts."""
        return None if isinstance(a, Tensor | nn.Module) else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """One operation more."""
        if len(self.graph.nodes) >= MAX_NODES:
            raise _TooLargeError
        return super().create_node(*args, **kwargs)

    def edges_of(self, graph: fx.Graph) -> Iterator[tuple[str, str]]:
        """(source, target) for each flow between layers, some more than once."""
        sources: dict[fx.Node, frozenset[str]] = {}
        names = {self._paths[key]: [layer_id] for key, layer_id in self._layer_ids.items() if key in self._paths}
        passing = {**names, **self.chains}
        for node in graph.nodes:
            inputs = () if _is_about_shape(node) else node.all_input_nodes
            reaching = frozenset(name for earlier in inputs for name in sources[earlier])
            passed = passing.get(str(node.target), []) if node.op == "call_module" else []
            if passed:
                yield from ((name, passed[0]) for name in reaching)
                yield from pairwise(passed)
                reaching = frozenset({passed[-1]})
            sources[node] = reaching


def _is_about_shape(node: fx.Node) -> bool:
    """Whether a node is of no values: what it gives tells nothing of what the layers gave."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _ABOUT_SHAPE
    return node.op == "call_method" and node.target in _ABOUT_SHAPE


def _layers_inside(root: nn.Module, layer_ids: Mapping[int, str]) -> dict[int, tuple[nn.Module, list[str]]]:
    """Each module with the ids of the layers that it contains, itself not among them, as registered."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}

    def visit(module: nn.Module) -> list[str]:
        if id(module) not in found:
            inside: list[str] = []
            found[id(module)] = (module, inside)
            for child in module._modules.values():
                if child is not None:
                    own = [layer_ids[id(child)]] if id(child) in layer_ids else []
                    inside.extend(own or visit(child))
        return found[id(module)][1]

    visit(root)
    for module in root.modules():  # what lies inside a layer is not looked at, and still may be called
        found.setdefault(id(module), (module, []))
    return found


def _defaults(forward: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that a caller need not give, as they are when he does not; the first always flows."""
    taken = list(inspect.signature(forward).parameters.values())
    return {p.name: p.default for p in taken[1:] if p.default is not p.empty}
