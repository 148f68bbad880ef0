"""The network: encoders, message passing over the model's graph, the gain of every legal choice, a value.

A layer's node takes in what its seeds tell, then hears in each round from the layers that feed it and
from those that it feeds (means, with weights of their own, as GraphSAGE does: Hamilton et al. 2017),
and from its whole graph. A germination is scored by a bilinear form of seed and kernel, so that
thousands of seeds beside dozens of kernels cost one small product each. To each score is added what the inputs of run,
layer, seed and kernel say linearly (as in wide & deep learning, Cheng et al. 2016): of few runs that part learns most.
All sizes may vary from view to view.

D: width. B, L, S, K, C as in ``GraphBatch``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper.graph.features import Level
from esper.services.tamiyo.gnn.graph_batch import UNKNOWN_BLUEPRINT, GraphBatch
from esper.services.tamiyo.gnn.pooling import Scatter, find_scatter
from esper.services.tamiyo.gnn.view_arrays import input_names

LEVELS = (Level.RUN, Level.LAYER, Level.SEED, Level.KERNEL)
PLAIN = {Level.RUN: 3, Level.LAYER: 3, Level.SEED: 3, Level.KERNEL: 1}
"""What inputs say of gains by themselves: of germinating, culling and fossilizing there; of germinating a kernel."""
MAX_DEVIATION = 5.0
"""An input so many standard deviations from what training saw counts as no more."""


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """How large a network is: its width, its rounds of messages, the blueprints that it knows by name."""

    width: int = 16
    rounds: int = 1
    num_blueprints: int = 0


class Scores(NamedTuple):
    """``gain`` (C,): the reward that each choice would bring; 0 of WAIT, which is what all others are compared with.

    ``value`` (B,): the reward to be expected in the state, under the policy that acted.
    """

    gain: Tensor
    value: Tensor


class Dropout:
    """Leaves out a share of the numbers at random, and makes the others larger (Srivastava et al. 2014).

    Args:
        generator: what its chance comes from.
    """

    def __init__(self, share: float, generator: torch.Generator) -> None:
        self._kept, self._generator = 1.0 - share, generator

    def __call__(self, values: Tensor) -> Tensor:
        """Another draw each time."""
        return values * ((torch.rand(values.shape, generator=self._generator) < self._kept) / self._kept)


class PolicyNetwork(nn.Module):
    """See the module. ``scatter`` may be exchanged at any time: the numbers stay. ``dropout`` is there while it learns.

    ``reward_scale`` is the unit that the heads speak in, so that what they learn is near 1; scores are in the reward's.
    ``calibration`` is what gains are multiplied with, so that they are right on average on runs not learnt from.
    """

    reward_scale: Tensor
    calibration: Tensor

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        width = shape.width
        self.shape = shape
        self.dropout: Dropout | None = None
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
        self.plain = nn.ModuleDict(
            {level: nn.Linear(len(input_names(level)), n, bias=False) for level, n in PLAIN.items()}
        )
        self.value = nn.Linear(width, 1)
        self.register_buffer("reward_scale", torch.ones(()))
        self.register_buffer("calibration", torch.ones(()))
        for head in (self.of_seed, self.of_kernel, self.value):
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        for weight in self.plain.parameters():
            nn.init.zeros_(weight)

    def use_scatter(self, name: str, scatter: Scatter) -> None:
        """Pool in another way."""
        self.scatter_name, self.scatter = name, scatter

    def forward(self, batch: GraphBatch) -> Scores:
        """Scores of all choices of all views."""
        num_graphs, num_layers = len(batch.run), len(batch.layers)
        run, plain_run = self._read(Level.RUN, batch.run)
        seeds, plain_seeds = self._read(Level.SEED, batch.seeds)
        kernels, plain_kernels = self._read(Level.KERNEL, batch.kernels)
        own, plain_layers = self._read(Level.LAYER, batch.layers)
        kernels = kernels + self.blueprints(batch.blueprint)
        mean = self.scatter(seeds, batch.seed_layer, num_layers, "mean")
        most = self.scatter(seeds, batch.seed_layer, num_layers, "max")
        nodes = self.gather(torch.cat([own, mean, most, run[batch.layer_graph]], dim=1))
        for round_ in self.rounds:
            nodes = round_(nodes, batch, self.scatter, num_graphs)
        pooled = [self.scatter(nodes, batch.layer_graph, num_graphs, how) for how in ("mean", "max")]
        graph = self.whole(torch.cat([run, *pooled], dim=1))
        around = self.in_layer(nodes) + self.in_graph(graph)[batch.layer_graph]  # as of a layer: seeds are many more
        placed = self.in_place(seeds + around[batch.seed_layer])
        plain = plain_seeds + (plain_layers + plain_run[batch.layer_graph])[batch.seed_layer]
        gain = self._gains(batch, placed, kernels, plain, plain_kernels)
        value = self.value(graph.detach()).squeeze(1)  # of whom WAIT says much, and of gains nothing
        return Scores(gain * self.reward_scale * self.calibration, value * self.reward_scale)

    def _read(self, level: Level, values: Tensor) -> tuple[Tensor, Tensor]:
        """The code of each row, and what its inputs say of gains without any code between."""
        values = self.scales[level](values)
        if self.dropout is not None:
            values = self.dropout(values)
        code: Tensor = self.encoders[level](values)
        return (code if self.dropout is None else self.dropout(code)), self.plain[level](values)

    def _gains(
        self, batch: GraphBatch, placed: Tensor, kernels: Tensor, plain: Tensor, plain_kernels: Tensor
    ) -> Tensor:
        left, alone = self.of_seed(placed).split([self.shape.width, 3], dim=1)
        right, bias = self.of_kernel(kernels).split([self.shape.width, 1], dim=1)
        alone, bias = alone + plain, bias + plain_kernels
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
        if not len(rows):
            return
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
