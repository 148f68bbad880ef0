"""The network: encoders, message passing over the layers, the gain of every legal choice, and a state value.

A layer's node aggregates its seeds. In each round it receives messages from its predecessors, its successors (means
with separate weights, as in GraphSAGE: Hamilton et al. 2017) and its whole graph. A germination is scored by a bilinear
form of seed and kernel, so that thousands of seeds with dozens of kernels cost one small matrix product. A linear model
of the inputs of run, layer, seed and kernel is added to each score (as in wide & deep learning, Cheng et al. 2016):
with few training runs this part learns most. All sizes may vary between views.

Attribute names of modules are keys of stored weights, so they are part of the policy file's format.

D: width. B, L, S, K, C as in ``GraphBatch``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper.graph.view_features import Level
from esper.services.tamiyo.gnn.graph_batch import GraphBatch
from esper.services.tamiyo.gnn.pooling import Scatter, find_scatter
from esper.services.tamiyo.gnn.view_arrays import input_names

LEVELS = (Level.RUN, Level.LAYER, Level.SEED, Level.KERNEL)
NUM_LINEAR_OUTPUTS = {Level.RUN: 3, Level.LAYER: 3, Level.SEED: 3, Level.KERNEL: 1}
"""Outputs of the linear model of each level: germinate, cull and fossilize; of a kernel germinate alone."""
MAX_DEVIATION = 5.0
"""Scaled inputs are clipped to this many standard deviations of the training set."""


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Size of a network: hidden width, rounds of message passing, known blueprints."""

    width: int = 16
    rounds: int = 1
    num_blueprints: int = 0


class Scores(NamedTuple):
    """Scores of all choices, in units of the reward.

    Attributes:
        gain: (C,), the expected reward of each choice; 0 for WAIT, with which the others are compared.
        value: (B,), the expected reward of the state under the behaviour policy.
    """

    gain: Tensor
    value: Tensor


class Dropout:
    """Sets a share of the numbers to 0 and scales the others up (Srivastava et al. 2014).

    Unlike ``nn.Dropout`` it draws from its own generator, so that training is reproducible.
    """

    def __init__(self, share: float, generator: torch.Generator) -> None:
        self._kept, self._generator = 1.0 - share, generator

    def __call__(self, values: Tensor) -> Tensor:
        """Apply a new random mask."""
        return values * ((torch.rand(values.shape, generator=self._generator) < self._kept) / self._kept)


class PolicyNetwork(nn.Module):
    """Scores the choices of a ``GraphBatch``.

    Attributes:
        scatter: can be exchanged at any time; the results agree.
        dropout: set during training only.
        reward_scale: the unit of the heads, so that their targets are near 1; scores are in units of the reward.
        calibration: factor of the gains, fitted on validation runs so that gains are unbiased.
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
            {level: nn.Linear(len(input_names(level)), n, bias=False) for level, n in NUM_LINEAR_OUTPUTS.items()}
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
        """Exchange the scatter function."""
        self.scatter_name, self.scatter = name, scatter

    def forward(self, batch: GraphBatch) -> Scores:
        """Return the scores of all choices of all views."""
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
        around = self.in_layer(nodes) + self.in_graph(graph)[batch.layer_graph]  # per layer: seeds are many more
        placed = self.in_place(seeds + around[batch.seed_layer])
        plain = plain_seeds + (plain_layers + plain_run[batch.layer_graph])[batch.seed_layer]
        gain = self._gains(batch, placed, kernels, plain, plain_kernels)
        value = self.value(graph.detach()).squeeze(1)  # detached: WAIT trains the value, but says nothing about gains
        return Scores(gain * self.reward_scale * self.calibration, value * self.reward_scale)

    def _read(self, level: Level, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the code of each row, and the outputs of the linear part."""
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
            torch.addmm(alone[g.seeds, :1] + bias[g.kernels].T, left[g.seeds], right[g.kernels].T).reshape(-1)
            for g in batch.germinations
        ]
        gain: Tensor = alone.new_zeros(sum(batch.num_choices))
        if germinations:
            gain = gain.index_copy(0, batch.germination_choice, torch.cat(germinations))
        for column, (seed, choice) in enumerate((batch.cull, batch.fossilize), 1):
            gain = gain.index_copy(0, choice, alone[seed, column])
        return gain

    def fit_scales(self, arrays: Mapping[Level, Tensor]) -> None:
        """Set mean and standard deviation of each input from rows of the training set."""
        for level in LEVELS:
            scale = self.scales[level]
            assert isinstance(scale, _Scale)
            scale.fit(arrays[level])


class _Scale(nn.Module):
    """(x - mean) / standard deviation of the training set; an input that is constant there becomes 0."""

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
    """One round of message passing with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own, self.before, self.behind, self.all = (nn.Linear(width, width) for _n in range(4))

    def forward(self, nodes: Tensor, batch: GraphBatch, scatter: Scatter, num_graphs: int) -> Tensor:
        states = self.norm(nodes)
        source, target = batch.edges
        before = scatter(states[source], target, len(nodes), "mean")
        behind = scatter(states[target], source, len(nodes), "mean")
        whole = scatter(states, batch.layer_graph, num_graphs, "mean")
        messages = self.own(states) + self.before(before) + self.behind(behind) + self.all(whole)[batch.layer_graph]
        return nodes + torch.relu(messages)


def _mlp(num_inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
