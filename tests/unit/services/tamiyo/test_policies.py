"""Policies: legal choices only, exploration of each, and the logged probability is that of the sample."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.cli.tamiyo.corpus import RANDOM_TAMIYO
from esper.config import load_settings
from esper.graph.graph_view import EpochView, GraphView, KernelView, LayerView, SeedView
from esper.graph.health_windows import FIELDS
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.schemas.lifecycle import ACTIVE_STAGES
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.policies import EpsilonSoft
from esper.services.tamiyo.policies.heuristic import HeuristicPolicy
from esper.services.tamiyo.policies.policy_sources import make_policy
from esper.services.tamiyo.settings import HeuristicSettings, TamiyoSettings

NO_HEALTH = dict.fromkeys(FIELDS)


def layer(name: str, gradient: float | None = 0.1) -> LayerView:
    health = {**NO_HEALTH, "gradient_norm": gradient, "dead_ratio": 0.0}
    return LayerView(name, LayerKind.LINEAR, 8, 100, 2, health, 0.0)


def seed(name: str, number: int, stage: SeedStage = SeedStage.DORMANT, germinated: int | None = None) -> SeedView:
    return SeedView(name, number, stage, germinated or 0, None, 0, germinated, NO_HEALTH)


def kernel(name: str, size: int) -> KernelView:
    return KernelView(name, 3, "ab" * 32, 10, LayerKind.LINEAR, 8, size)


def view(values: list[float], seeds: list[SeedView], **changed: Any) -> GraphView:
    epochs = tuple(EpochView(n, 100 * (n + 1), {"val_accuracy": v}) for n, v in enumerate(values))
    fields: dict[str, Any] = {
        "run_id": "r", "incarnation": 1, "boundary": 7, "step": 100 * len(values), "epoch": len(values),
        "layers": (layer("a"), layer("b", 0.5)), "edges": (("a", "b"),), "seeds": tuple(seeds), "epochs": epochs,
        "kernels": (kernel("small", 50), kernel("large", 300), kernel("huge", 10_000)),
    }  # fmt: skip
    return GraphView(**{**fields, **changed})


DORMANT = [seed(name, n) for name in ("a", "b") for n in range(2)]
VIEWS = st.builds(
    lambda values, stages, boundary: view(
        values,
        [seed(name, n, stages[2 * k + n], 1) for k, name in enumerate(("a", "b")) for n in range(2)],
        boundary=boundary,
    ),
    st.lists(st.floats(0, 1), max_size=8),
    st.lists(st.sampled_from(list(SeedStage)), min_size=4, max_size=4),
    st.integers(1, 50),
)
KINDS = st.sampled_from(["heuristic", "wait", "random", "schedule"])


@given(view=VIEWS, kind=KINDS, epsilon=st.floats(0.05, 1.0))
def test_every_legal_choice_is_sampled_with_its_probability(view: GraphView, kind: str, epsilon: float) -> None:
    settings = TamiyoSettings.model_validate({"policy": kind, "epsilon": epsilon})
    policy = make_policy(settings)
    soft_policy, choices = EpsilonSoft(policy, epsilon, rng_seed=3), legal_choices(view)
    probabilities = soft_policy.soften(policy.distribution(view, choices), len(choices))
    assert math.isclose(sum(probabilities), 1.0, abs_tol=1e-9)
    assert min(probabilities) >= epsilon / len(choices) - 1e-12
    for choice in choices:
        stage = choice.seed.stage if choice.seed else None
        assert choice.action is not Action.GERMINATE or (stage is SeedStage.DORMANT and choice.kernel is not None)
        assert choice.action is not Action.CULL or stage in ACTIVE_STAGES
        assert choice.action is not Action.FOSSILIZE or stage is SeedStage.EVALUATING
    sampled = soft_policy.choose(view)
    assert sampled.probability == probabilities[choices.index(sampled.choice)]
    assert soft_policy.choose(view) == sampled


def test_environment_of_a_corpus_sets_the_random_policy() -> None:
    tamiyo = load_settings(environ=RANDOM_TAMIYO).section("tamiyo", TamiyoSettings)
    assert (tamiyo.policy, tamiyo.random_wait_probability) == ("random", 0.7)


def test_policy_without_exploration_is_rejected() -> None:
    with pytest.raises(ValueError, match="without exploration"):
        EpsilonSoft(make_policy(TamiyoSettings.model_validate({})), 0.01, 0)


def heuristic_choice(view: GraphView, **thresholds: Any):
    policy = HeuristicPolicy(HeuristicSettings.model_validate(thresholds))
    choices = legal_choices(view)
    found = policy.distribution(view, choices)
    return choices[max(found.probabilities, key=lambda n: found.probabilities[n])], found.reason


def test_heuristic_waits_while_the_metric_rises() -> None:
    choice, reason = heuristic_choice(view([0.1, 0.3, 0.5, 0.6, 0.7], DORMANT))
    assert choice.action is Action.WAIT
    assert "still learning" in reason


def test_heuristic_grows_the_layer_with_the_highest_strain() -> None:
    choice, reason = heuristic_choice(view([0.6, 0.7, 0.70, 0.70, 0.705], DORMANT))
    assert choice.action is Action.GERMINATE
    assert choice.seed is not None
    assert choice.kernel is not None
    assert (choice.seed.layer_id, choice.seed.seed_id, choice.kernel.blueprint_id) == ("b", 0, "large")
    assert "plateau" in reason


def test_heuristic_has_one_active_seed() -> None:
    busy = [seed("a", 0, SeedStage.TRAINING, 200), *DORMANT[1:]]
    choice, reason = heuristic_choice(view([0.7] * 6, busy))
    assert choice.action is Action.WAIT
    assert "in progress" in reason


@pytest.mark.parametrize(("after", "action"), [(0.72, Action.FOSSILIZE), (0.69, Action.FOSSILIZE), (0.5, Action.CULL)])
def test_heuristic_fossilizes_or_culls_by_the_metric(after: float, action: Action) -> None:
    evaluated = [SeedView("a", 0, SeedStage.EVALUATING, 450, "x", 9, 300, NO_HEALTH), *DORMANT[1:]]
    choice, _reason = heuristic_choice(view([0.7, 0.7, 0.7, 0.71, after], evaluated))
    assert choice.action is action


def test_heuristic_evaluates_a_seed_after_an_epoch() -> None:
    evaluated = [SeedView("a", 0, SeedStage.EVALUATING, 500, "x", 9, 300, NO_HEALTH), *DORMANT[1:]]
    choice, reason = heuristic_choice(view([0.7] * 5, evaluated))
    assert choice.action is Action.WAIT
    assert "no epoch ended" in reason
