"""How data flows between the layers that hold seeds: torch.fx where it can trace, order elsewhere."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import fx, nn

from esper.schemas.assets import LayerEdge


def edges_between(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[LayerEdge, ...]:
    """The edges among ``layers`` (qualified name -> module), through modules that are not in it.

    A model that torch.fx cannot trace gets a chain in the order of registration.
    """
    try:
        graph = _Tracer(set(layers)).trace(model)
    except Exception:  # whatever a foreign forward() raises when it is traced
        return _chain(list(layers))
    return _from_graph(graph, set(layers))


class _Tracer(fx.Tracer):
    """Stops at the layers that hold seeds, whatever their class."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether tracing does not look inside."""
        return module_qualified_name in self._names or super().is_leaf_module(m, module_qualified_name)


def _from_graph(graph: fx.Graph, names: set[str]) -> tuple[LayerEdge, ...]:
    sources: dict[fx.Node, set[str]] = {}
    edges = set()
    for node in graph.nodes:
        reaching = {name for earlier in node.all_input_nodes for name in sources[earlier]}
        if node.op == "call_module" and node.target in names:
            edges |= {(name, str(node.target)) for name in reaching}
            reaching = {str(node.target)}
        sources[node] = reaching
    return tuple(LayerEdge(source=a, target=b) for a, b in sorted(edges))


def _chain(names: Sequence[str]) -> tuple[LayerEdge, ...]:
    return tuple(LayerEdge(source=a, target=b) for a, b in pairwise(names))
