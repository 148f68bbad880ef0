"""Records which kernels growing runs ask for: `python tests/benchmarks/kasmina/traces/record_growth.py`, the same bytes every time.

Three models train at once in one process, one run after another. Real: the layers of wrapped torch models, the
blueprints that Esper ships and their sizes, the table and the schedule of a seed's life, Tamiyo's heuristic made
epsilon-soft over graph views. Drawn from a seed: accuracy, gradients, and whether a seed does good. No weight is
trained and no service runs, so that anybody can make the trace again; with other blueprints it is another trace.
"""

import hashlib
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import esper
from esper.graph.graph_view import EpochView, GraphView, KernelView, LayerView, SeedView
from esper.graph.health_windows import FIELDS
from esper.kasmina.catalogue import cost_of
from esper.kasmina.lifecycle import NEXT_BY_SCHEDULE, StageSchedule
from esper.schemas.assets import LayerNode
from esper.schemas.enums import Action, SeedStage
from esper.schemas.lifecycle import given_up_stage
from esper.services.tamiyo.policies import EpsilonSoft
from esper.services.tamiyo.policies.heuristic import HeuristicPolicy
from esper.services.tamiyo.settings import HeuristicSettings, TamiyoSettings
from esper.services.urza.kernels.shipped_blueprints import SHIPPED

TRACE = Path(__file__).parent / "growth.json"
NUM_SWEEPS, NUM_EPOCHS, BOUNDARIES_PER_EPOCH = 24, 60, 4
EPSILON = TamiyoSettings.model_validate({}).epsilon
FLOAT32_BYTES = 4


def digits() -> nn.Module:
    """The demo's sizes."""
    layers = [nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(256, 64), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def resnet_like() -> nn.Module:
    """The convolutions of a ResNet-18."""
    layers, width_in = [nn.Conv2d(3, 64, 7)], 64
    for width in (64, 128, 256, 512):
        layers += [nn.Conv2d(width_in, width, 3), *(nn.Conv2d(width, width, 3) for _n in range(3))]
        width_in = width
    return nn.Sequential(*layers, nn.Linear(512, 10))


def encoder() -> nn.Module:
    """A small transformer's linear layers."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 1024), 6, enable_nested_tensor=False)


@dataclass
class Run:
    """One run: where its seeds stand, its accuracy, its chance."""

    name: str
    nodes: tuple[LayerNode, ...]
    kernels: tuple[KernelView, ...]
    chance: random.Random
    epochs: list[EpochView] = field(default_factory=list)
    seeds: dict[tuple[str, int], SeedView] = field(default_factory=dict)
    since: dict[tuple[str, int], int] = field(default_factory=dict)
    strain: dict[str, float] = field(default_factory=dict)
    ceiling: float = 0.6

    def view(self, boundary: int) -> GraphView:
        """What Tamiyo would see."""
        return GraphView(
            self.name, 1, boundary, boundary, len(self.epochs), tuple(self._layer(n) for n in self.nodes), (),
            tuple(self.seeds.values()), tuple(self.epochs), self.kernels,
        )  # fmt: skip

    def _layer(self, node: LayerNode) -> LayerView:
        self.strain[node.layer_id] = self.strain.get(node.layer_id, 0.1) * math.exp(self.chance.gauss(0, 0.1))
        health = {**dict.fromkeys(FIELDS), "gradient_norm": self.strain[node.layer_id], "dead_ratio": 0.0}
        return LayerView(
            node.layer_id, node.kind, node.num_features, node.num_parameters, node.num_seeds, health, 0.0
        )  # fmt: skip

    def move(self, key: tuple[str, int], to: SeedStage, boundary: int) -> None:
        """One move; a grown seed changes what the model can reach."""
        if to is SeedStage.STABILIZING:
            self.ceiling = min(0.99, max(0.3, self.ceiling + self.chance.gauss(0.01, 0.03)))
        germinated = boundary if to is SeedStage.GERMINATED else self.seeds[key].germinated_at_step
        self.seeds[key] = SeedView(*key, to, boundary, "b", 0, germinated, {})
        self.since[key] = boundary

    def advance(self, boundary: int, schedule: StageSchedule) -> None:
        """What the schedule moves; the epoch's end."""
        for key, seed in list(self.seeds.items()):
            if seed.stage in NEXT_BY_SCHEDULE:
                to, length = NEXT_BY_SCHEDULE[seed.stage]
                if boundary - self.since[key] >= getattr(schedule, length):
                    self.move(key, to, boundary)
        if boundary % BOUNDARIES_PER_EPOCH == 0:
            reached = self.ceiling * (1 - math.exp(-(len(self.epochs) + 1) / 4)) + self.chance.gauss(0, 0.005)
            self.epochs.append(EpochView(len(self.epochs), boundary, {"val_accuracy": reached}))


def kernels_for(nodes: tuple[LayerNode, ...]) -> tuple[KernelView, ...]:
    """Every shipped blueprint at every width of the model."""
    found = []
    for kind, width in sorted({(n.kind, n.num_features) for n in nodes}):
        for name, spec in SHIPPED.items():
            if kind in spec.targets:
                count = cost_of(spec, kind, width).num_parameters
                digest = hashlib.sha256(f"{name}:{kind}:{width}".encode()).hexdigest()
                found.append(KernelView(name, 3, digest, count * FLOAT32_BYTES, kind, width, count))
    return tuple(found)


def record() -> list[tuple[str, str, int]]:
    """(run, kernel, its bytes) in the order in which they are asked for."""
    policy = EpsilonSoft(HeuristicPolicy(HeuristicSettings.model_validate({})), EPSILON, 0)
    schedule, asked = StageSchedule(), []
    with torch.device("meta"):
        models = {m.__name__: esper.wrap(m(), [nn.Linear, nn.Conv2d]) for m in (digits, resnet_like, encoder)}
    nodes = {name: model.graph()[0] for name, model in models.items()}
    for sweep in range(NUM_SWEEPS):
        runs = []
        for name, mine in nodes.items():
            run = Run(f"{name}-{sweep}", mine, kernels_for(mine), random.Random(f"{name}-{sweep}"))
            for node in mine:
                for n in range(node.num_seeds):
                    run.seeds[node.layer_id, n] = SeedView(node.layer_id, n, SeedStage.DORMANT, 0, None, 0, None, {})
            runs.append(run)
        for boundary in range(1, NUM_EPOCHS * BOUNDARIES_PER_EPOCH + 1):
            for run in runs:
                run.advance(boundary, schedule)
                choice = policy.choose(run.view(boundary)).choice
                if choice.seed is None:
                    continue
                key = (choice.seed.layer_id, choice.seed.seed_id)
                if choice.kernel is not None:
                    asked.append((run.name, choice.kernel.kernel_sha256, choice.kernel.size_bytes))
                    run.move(key, SeedStage.GERMINATED, boundary)
                elif choice.action is Action.CULL:
                    run.move(key, given_up_stage(choice.seed.stage), boundary)
                else:
                    run.move(key, SeedStage.FOSSILIZED, boundary)
    return asked


if __name__ == "__main__":
    asked = record()
    sizes = {kernel: size for _run, kernel, size in asked}
    runs = list(dict.fromkeys(run for run, _kernel, _size in asked))
    kernels = {kernel: n for n, kernel in enumerate(sizes)}
    trace = {
        "how": "python tests/benchmarks/kasmina/traces/record_growth.py",
        "accesses": "[run, kernel], in the order in which they were asked for",
        "runs": runs,
        "size_bytes": list(sizes.values()),
        "asked": [[runs.index(run), kernels[kernel]] for run, kernel, _size in asked],
    }
    TRACE.write_text(json.dumps(trace, separators=(",", ":")) + "\n")
    print(f"{len(asked)} kernels asked for, {len(sizes)} different, {sum(sizes.values()) / 2**20:.1f} MiB: {TRACE}")
