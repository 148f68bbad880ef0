"""The network: encoders, message passing over the model's graph, the gain of every legal choice, a value.

A layer's node takes in what its seeds tell, then hears in each round from the layers that feed it and
from those that it feeds (means, with weights of their own, as GraphSAGE does: Hamilton et al. 2017),
and from its whole graph. A germination is scored by a bilinear form of seed and kernel, so that
thousands of seeds beside dozens of kernels cost one small product each. All sizes may vary from view to view.

D: width. B, L, S, K, C as in ``GraphBatch``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper.graph.features import Level
from esper.services.tamiyo.gnn.batch import UNKNOWN_BLUEPRINT, GraphBatch
from esper.services.tamiyo.gnn.inputs import input_names
from esper.services.tamiyo.gnn.pooling import Scatter, find_scatter

LEVELS = (Level.RUN, Level.LAYER, Level.SEED, Level.KERNEL)
MAX_DEVIATION = 5.0
"""An input so many standard deviations from what training saw counts as no more."""


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """How large a network is: its width, its rounds of messages, the blueprints that it knows by name."""

    width: int = 32
    rounds: int = 2
    num_blueprints: int = 0


class Scores(NamedTuple):
    """``gain`` (C,): the reward that each choice would bring; 0 of WAIT, which is what all others are compared with.

    ``value`` (B,): the reward to be expected in the state, under the policy that acted.
    """

    gain: Tensor
    value: Tensor


class PolicyNetwork(nn.Module):
    """See the module. ``scatter`` may be exchanged at any time: the numbers stay.

    ``reward_scale`` is the unit that the heads speak in, so that what they learn is near 1; scores are in the reward's.
    """

    reward_scale: Tensor

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        width = shape.width
        self.shape = shape
        self.scatter_name, self.scatter = find_scatter()
        self.scales = nn.ModuleDict({level: _Scale(len(input_names(level))) for level in LEVELS})
        self.encoders = nn.ModuleDict({level: _mlp(len(input_names(level)), width) for level in LEVELS})
        self.blueprints = nn.Embedding(1 + shape.num_blueprints, width)
        nn.init.zeros_(self.blueprints.weight)
        self.gather = _mlp(4 * width, width)
        self.rounds = nn.ModuleList(_Round(width) for _n in range(shape.rounds))
        self.whole = _mlp(3 * width, width)
        self.in_layer, self.in_graph = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.in_place = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.of_seed = nn.Linear(width, width + 3)  # the bilinear form's left side; germinate, cull, fossilize
        self.of_kernel = nn.Linear(width, width + 1)
        self.value = nn.Linear(width, 1)
        self.register_buffer("reward_scale", torch.ones(()))
        for head in (self.of_seed, self.of_kernel, self.value):
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def use_scatter(self, name: str, scatter: Scatter) -> None:
        """Pool in another way."""
        self.scatter_name, self.scatter = name, scatter

    def forward(self, batch: GraphBatch) -> Scores:
        """Scores of all choices of all views."""
        num_graphs, num_layers = len(batch.run), len(batch.layers)
        run = self._encode(Level.RUN, batch.run)
        seeds = self._encode(Level.SEED, batch.seeds)
        kernels = self._encode(Level.KERNEL, batch.kernels) + self.blueprints(batch.blueprint)
        own = self._encode(Level.LAYER, batch.layers)
        mean = self.scatter(seeds, batch.seed_layer, num_layers, "mean")
        most = self.scatter(seeds, batch.seed_layer, num_layers, "max")
        nodes = self.gather(torch.cat([own, mean, most, run[batch.layer_graph]], dim=1))
        for round_ in self.rounds:
            nodes = round_(nodes, batch, self.scatter, num_graphs)
        pooled = [self.scatter(nodes, batch.layer_graph, num_graphs, how) for how in ("mean", "max")]
        graph = self.whole(torch.cat([run, *pooled], dim=1))
        around = self.in_layer(nodes) + self.in_graph(graph)[batch.layer_graph]  # as of a layer: seeds are many more
        placed = self.in_place(seeds + around[batch.seed_layer])
        gain = self._gains(batch, placed, kernels)
        return Scores(gain * self.reward_scale, self.value(graph).squeeze(1) * self.reward_scale)

    def _encode(self, level: Level, values: Tensor) -> Tensor:
        encoded: Tensor = self.encoders[level](self.scales[level](values))
        return encoded

    def _gains(self, batch: GraphBatch, placed: Tensor, kernels: Tensor) -> Tensor:
        left, alone = self.of_seed(placed).split([self.shape.width, 3], dim=1)
        right, bias = self.of_kernel(kernels).split([self.shape.width, 1], dim=1)
        left = left / self.shape.width**0.5
        germinations = [
            torch.addmm(alone[o.seeds, :1] + bias[o.kernels].T, left[o.seeds], right[o.kernels].T).reshape(-1)
            for o in batch.offers
        ]
        gain: Tensor = alone.new_zeros(sum(batch.num_choices))
        if germinations:
            gain = gain.index_copy(0, batch.germinate, torch.cat(germinations))
        for column, (seed, place) in enumerate((batch.cull, batch.fossilize), 1):
            gain = gain.index_copy(0, place, alone[seed, column])
        return gain

    def fit_scales(self, arrays: Mapping[Level, Tensor]) -> None:
        """Take mean and deviation of each input from rows of the training set."""
        for level in LEVELS:
            scale = self.scales[level]
            assert isinstance(scale, _Scale)
            scale.fit(arrays[level])


class _Scale(nn.Module):
    """(x - mean) / deviation, as the training set had them; what never varied there goes in as 0."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("inverse", torch.ones(num_inputs))

    def fit(self, rows: Tensor) -> None:
        deviation, mean = torch.std_mean(rows.double(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.inverse.copy_(torch.where(deviation > 1e-6, 1.0 / deviation.clamp(min=1e-6), 0.0))

    def forward(self, values: Tensor) -> Tensor:
        scaled: Tensor = (values - self.mean) * self.inverse
        return scaled.clamp(-MAX_DEVIATION, MAX_DEVIATION)


class _Round(nn.Module):
    """One round of messages, added to what the node knew."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own, self.before, self.behind, self.all = (nn.Linear(width, width) for _n in range(4))

    def forward(self, nodes: Tensor, batch: GraphBatch, scatter: Scatter, num_graphs: int) -> Tensor:
        said = self.norm(nodes)
        source, target = batch.edges
        before = scatter(said[source], target, len(nodes), "mean")
        behind = scatter(said[target], source, len(nodes), "mean")
        whole = scatter(said, batch.layer_graph, num_graphs, "mean")
        heard = self.own(said) + self.before(before) + self.behind(behind) + self.all(whole)[batch.layer_graph]
        return nodes + torch.relu(heard)


def _mlp(num_inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


__all__ = ["LEVELS", "UNKNOWN_BLUEPRINT", "NetworkShape", "PolicyNetwork", "Scores"]
