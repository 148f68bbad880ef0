"""Decisions per second of a replay: read from Kafka, joined into experiences, views decoded, policies evaluated.

The table has one row for each number of layers (4 seeds per layer), measured in one run. Views are as Tamiyo records
them. Every second decision germinates and has the report of a fork. Half of the views belong to no decision, so that
half of the records are read in vain.
"""

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.data.decided_runs import KERNELS, Story, decided, recorded, reported
from support.stacks import running_stack

from esper.config import KafkaSettings
from esper.graph.graph_view import EpochView, GraphView, LayerView, SeedView
from esper.graph.health_windows import FIELDS
from esper.oona.producer import OonaProducer
from esper.schemas import ids
from esper.schemas.enums import LayerKind, SeedStage
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.dataset.log_ranges import ReplayRange
from esper.services.tamiyo.dataset.log_replay import replay
from esper.services.tamiyo.evaluation.policy_evaluation import baselines, evaluate
from esper.services.tamiyo.settings import TamiyoSettings

NUM_SEEDS = 4
NUM_RUNS = 20
TAMIYO = TamiyoSettings.model_validate({})


def views(run_id: str, num_layers: int, num: int, rng: random.Random) -> Iterator[GraphView]:
    """Views of a run with health signals."""

    def health() -> dict[str, float | None]:
        return {name: rng.random() for name in FIELDS}

    for boundary in range(1, num + 1):
        names = [f"layer{n}" for n in range(num_layers)]
        layers = tuple(LayerView(n, LayerKind.LINEAR, 8, 72, NUM_SEEDS, health(), 0.0, health(), 64) for n in names)
        seeds = tuple(
            SeedView(n, k, SeedStage.DORMANT, 0, None, 0, None, health(), health(), 0.0, 16, boundary, 0, 0)
            for n in names
            for k in range(NUM_SEEDS)
        )
        epochs = tuple(EpochView(n, n * 10, {"val_accuracy": rng.random()}) for n in range(min(boundary, 20)))
        edges = tuple(itertools.pairwise(names))
        yield GraphView(run_id, 1, boundary, boundary * 10, boundary, layers, edges, seeds, epochs, KERNELS)


def decided_runs(num_layers: int, num_decisions: int, rng: random.Random) -> Story:
    """Events of runs with decisions."""
    story = Story()
    for n in range(NUM_RUNS):
        for view in views(f"bench-{num_layers}-{n}", num_layers, num_decisions // NUM_RUNS, rng):
            key = (view.run_id, view.incarnation, view.boundary)
            choices = legal_choices(view)
            choice = choices[rng.randrange(1, len(choices)) if view.boundary % 2 else 0]
            story.add(recorded(view), ids.view_id(*key))
            story.add(decided(view, choice, 1 / len(choices)), ids.decision_id(*key))
            story.add(recorded(view, boundary=100_000 + view.boundary), ids.view_id(key[0], 1, 100_000 + view.boundary))
            if choice.seed is not None:
                reported(story, key, choice, ids.decision_id(*key), after=rng.random())
    return story


def timed(num: int, act: Callable[[], Any]) -> tuple[Any, float]:
    """Result of a call, and decisions per second."""
    began = time.perf_counter()
    found = act()
    return found, num / (time.perf_counter() - began)


async def send(kafka: KafkaSettings, story: Story) -> None:
    async with OonaProducer(kafka) as producer:
        for messages in story.messages.values():
            for start in range(0, len(messages), 500):
                await producer.send_batch(messages[start : start + 500])


def measure(kafka: KafkaSettings, num_layers: int, num_decisions: int) -> None:
    asyncio.run(send(kafka, decided_runs(num_layers, num_decisions, random.Random(num_layers))))
    log_range = ReplayRange(runs=(f"bench-{num_layers}-*",))
    phases: dict[str, float] = {}

    def on_progress(what: Any) -> None:
        phases.setdefault(what.phase.split(":")[0], time.perf_counter())

    began = time.perf_counter()
    found = asyncio.run(replay(kafka, log_range, TAMIYO.rent, on_progress=on_progress))
    ended = time.perf_counter()
    joining = phases["joining decisions"]
    experiences = found.joined.experiences
    assert len(experiences) == found.joined.num_decisions
    _views, decoding = timed(len(experiences), lambda: [one.view for one in experiences])
    _evaluated, evaluation = timed(
        len(experiences), lambda: evaluate(experiences, baselines(TAMIYO), epsilon=0.05, measured={})
    )
    size = sum(len(e.view_zstd) for e in experiences.stored) / len(experiences)
    rates = (num_decisions / (joining - began), num_decisions / (ended - joining), num_decisions / (ended - began))
    figures = "".join(f"{rate:>12,.0f}" for rate in (*rates, decoding, evaluation))
    print(f"{num_layers:>6}{len(experiences):>11,}{size:>11,.0f}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--decisions", type=int, default=4_000)
    arguments = parser.parse_args()
    heads = ("read/s", "joined/s", "replayed/s", "decoded/s", "evaluated/s")
    print(f"{'layers':>6}{'decisions':>11}{'view bytes':>11}" + "".join(f"{head:>12}" for head in heads))
    with running_stack() as stack:
        for num_layers in arguments.layers:
            measure(
                stack.settings().need_kafka(),
                num_layers,
                max(NUM_RUNS, arguments.decisions // max(1, num_layers // 20)),
            )


if __name__ == "__main__":
    main()
