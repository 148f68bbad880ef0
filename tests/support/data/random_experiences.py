"""Random experiences with a reward that can be learned: growth pays in layers with a large gradient."""

import math
import random
import uuid

import zstandard
from support.data.random_views import drawn_view

from esper.graph.graph_view import GraphView, digest_of
from esper.schemas.enums import Action, ReportMethod
from esper.services.tamiyo.control.legal_choices import Choice, legal_choices
from esper.services.tamiyo.dataset.experiences import Experience, StoredExperience

NOISE = 0.01


def true_gain(choice: Choice, layer_strain: float) -> float:
    """The expected reward: growth pays where the gradient is large, and more with one blueprint than with others."""
    if choice.action is not Action.GERMINATE or choice.kernel is None:
        return 0.0
    effect = {"blueprint-0": 0.02, "blueprint-1": -0.03}.get(choice.kernel.blueprint_id, 0.0)
    return effect + 0.02 * math.tanh(layer_strain)


def experience(rng: random.Random, run: int, boundary: int) -> Experience:
    view = drawn_view(rng, rng.randrange(2, 6), seeds_per_layer=1, num_blueprints=3, run_id=f"run-{run}")
    choices = legal_choices(view)
    chosen = rng.randrange(len(choices))
    choice = choices[chosen]
    reward = true_gain(choice, strain(view, choice)) + (rng.gauss(0, NOISE) if choice.action is not Action.WAIT else 0)
    return Experience(
        run_id=view.run_id, incarnation=1, boundary=boundary, step=100, view=view, chosen=chosen,
        probability=1 / len(choices), policy_id="random", policy_version=1, reward=reward, reward_variance=NOISE**2,
        method=ReportMethod.FORK, decision_id=uuid.UUID(int=rng.getrandbits(128)),
    )  # fmt: skip


def strain(view: GraphView, choice: Choice) -> float:
    layers = {layer.layer_id: layer for layer in view.layers}
    layer = layers[choice.seed.layer_id] if choice.seed else None
    return (layer.health["gradient_norm"] or 0.0) / 100 if layer else 0.0


def experiences(runs: range) -> list[Experience]:
    rng = random.Random(runs.start)
    return [experience(rng, run, boundary) for run in runs for boundary in range(1, 13)]


def stored(experience: Experience) -> StoredExperience:
    fields = {name: getattr(experience, name) for name in Experience.__dataclass_fields__ if name != "view"}
    data = experience.view.to_bytes()
    return StoredExperience(**fields, view_digest=digest_of(data), view_zstd=zstandard.compress(data))
