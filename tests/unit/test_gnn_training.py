"""Training the policy: it learns what can be learnt, to the bit the same each time, and goes on where it stopped."""

import math
import random
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from drawn_views import drawn_view

from esper.errors import ContractError
from esper.schemas.enums import Action, ReportMethod
from esper.services.tamiyo.choices import Choice, legal_choices
from esper.services.tamiyo.experiences import Experience
from esper.services.tamiyo.gnn.policy import GnnPolicy
from esper.services.tamiyo.gnn.settings import NetworkSettings, TrainingSettings
from esper.services.tamiyo.gnn.training import Curve, PolicyTrainer, Trained

NOISE = 0.01


def true_gain(choice: Choice, layer_strain: float) -> float:
    """What the made-up world rewards: growing where the gradient is large, with one blueprint more than others."""
    if choice.action is not Action.GERMINATE or choice.kernel is None:
        return 0.0
    liked = {"blueprint-0": 0.02, "blueprint-1": -0.03}.get(choice.kernel.blueprint_id, 0.0)
    return liked + 0.02 * math.tanh(layer_strain)


def experience(rng: random.Random, run: int, boundary: int) -> Experience:
    view = drawn_view(rng, rng.randrange(2, 6), seeds_per_layer=1, num_blueprints=3, run_id=f"run-{run}")
    choices = legal_choices(view)
    chosen = rng.randrange(len(choices))
    choice = choices[chosen]
    reward = true_gain(choice, strain(view, choice)) + (rng.gauss(0, NOISE) if choice.action is not Action.WAIT else 0)
    return Experience(
        view.run_id, 1, boundary, 100, view, chosen, 1 / len(choices), "random", 1, reward, NOISE**2,
        ReportMethod.FORK, uuid.UUID(int=rng.getrandbits(128)),
    )  # fmt: skip


def strain(view: object, choice: Choice) -> float:
    layers = {layer.layer_id: layer for layer in view.layers}  # type: ignore[attr-defined]
    layer = layers[choice.seed.layer_id] if choice.seed else None
    return (layer.health["gradient_norm"] or 0.0) / 100 if layer else 0.0


def experiences(runs: range) -> list[Experience]:
    rng = random.Random(runs.start)
    return [experience(rng, run, boundary) for run in runs for boundary in range(1, 13)]


TRAIN, HELD_OUT = experiences(range(60)), experiences(range(100, 125))
SHORT = TrainingSettings.model_validate(
    {"width": 16, "num_batches": 12, "batch_size": 64, "eval_every": 4, "learning_rate": 0.01}
)


def fit(
    train: list[Experience],
    held_out: list[Experience],
    how: TrainingSettings,
    progress: Callable[[Curve], None] = lambda _curve: None,
) -> Trained:
    return PolicyTrainer(train, held_out, how).fit(progress)


def test_a_policy_learns_which_growth_pays_in_runs_that_it_never_saw() -> None:
    settings = TrainingSettings.model_validate(
        {"width": 16, "num_batches": 60, "batch_size": 128, "learning_rate": 0.01}
    )
    curves: list[Curve] = []
    trained = fit(TRAIN, HELD_OUT, settings, curves.append)
    assert trained.held_out_loss < 0.75 * trained.baseline_loss
    assert len({c.batch for c in curves}) == len(curves)
    policy = GnnPolicy(trained.network, trained.blueprints, options=NetworkSettings(device="cpu"))
    picked, average = [], []
    for one in HELD_OUT:
        choices = legal_choices(one.view)
        gains = [true_gain(c, strain(one.view, c)) for c in choices]
        picked.append(gains[int(policy.gains([one.view])[0][0].argmax())])
        average.append(sum(gains) / len(gains))
    assert sum(picked) / len(picked) > sum(average) / len(average) + 0.01


def test_the_same_experiences_and_settings_give_the_same_weights_to_the_bit() -> None:
    first, second = (fit(TRAIN[:200], HELD_OUT[:50], SHORT) for _n in range(2))
    other = fit(TRAIN[:200], HELD_OUT[:50], SHORT.model_copy(update={"rng_seed": 1}))
    weights = [t.network.state_dict() for t in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize("stop_at", [1, 7])
def test_training_that_was_stopped_goes_on_as_if_it_had_not(stop_at: int) -> None:
    whole = fit(TRAIN[:200], HELD_OUT[:50], SHORT)
    stopped = PolicyTrainer(TRAIN[:200], HELD_OUT[:50], SHORT)
    for _n in range(stop_at):
        stopped.step()
    resumed = PolicyTrainer(TRAIN[:200], HELD_OUT[:50], SHORT)
    resumed.load_state_dict(stopped.state_dict())
    rest = resumed.fit()
    assert rest.held_out_loss == whole.held_out_loss
    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.network.state_dict().items())


def test_noise_teaches_nothing_and_training_ends_early() -> None:
    rng = random.Random(5)
    noise = [replace(e, reward=rng.gauss(0, NOISE) if e.chosen else 0.0) for e in TRAIN[:300]]
    held_out = [replace(e, reward=rng.gauss(0, NOISE) if e.chosen else 0.0) for e in HELD_OUT]
    settings = TrainingSettings.model_validate({"width": 16, "num_batches": 300, "eval_every": 2, "patience": 3})
    curves: list[Curve] = []
    trained = fit(noise, held_out, settings, curves.append)
    assert len(curves) < 300
    assert trained.held_out_loss > 0.97 * trained.baseline_loss


def test_without_runs_to_learn_from_or_to_hold_against_it_says_so() -> None:
    with pytest.raises(ContractError, match="0 experiences to learn from"):
        fit([], HELD_OUT, SHORT)
    with pytest.raises(ContractError, match="0 held out"):
        fit(TRAIN, [], SHORT)
