"""The training corpus draws the same plans from the same numbers, and many kinds of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import SHARED_DATA

from esper.errors import UnavailableError
from esper.graph.graph_view import NO_HEALTH, SeedView
from esper.graph.health_windows import WINDOW_STEPS
from esper.schemas.enums import Action, SeedStage
from esper.services.tamiyo.control.legal_choices import WAIT, Choice
from esper.services.tamiyo.policies.baselines import CULL, EARLY_CULL, RandomPolicy
from esper.services.tolaria.corpus.training_corpus import (
    MIN_BOUNDARY_STEPS,
    CorpusSettings,
    draw_plan,
    draw_plans,
    find_cifar,
)
from esper.services.tolaria.counterfactuals.branch_trainer import BranchTrainer, replay_commands
from esper.services.tolaria.training.cifar import load_cifar10
from esper.services.tolaria.training.training_loop import make_model

DATA = SHARED_DATA
CORPUS = CorpusSettings(seed=3, folder=Path("runs"))


@given(st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=50)
def test_plan_is_the_same_wherever_it_is_drawn(seed: int, number: int) -> None:
    corpus = CorpusSettings(seed=seed, folder=Path("runs"))
    assert draw_plan(corpus, number) == draw_plan(corpus, number) == next(draw_plans(corpus, number))
    assert draw_plan(corpus, number) != draw_plan(corpus, number + 1)
    assert (
        draw_plan(corpus, number).trainer.rng_seed
        != draw_plan(CorpusSettings(seed + 1, Path("runs")), number).trainer.rng_seed
    )


def test_plans_are_of_many_kinds_and_can_be_built() -> None:
    drawn = [draw_plan(CORPUS, n).trainer for n in range(60)]
    assert {t.network for t in drawn} == {"digits", "mlp", "cnn"}
    assert {t.optimizer for t in drawn} == {"sgd", "adamw"}
    assert {t.seeds_per_layer for t in drawn} == {1, 2}
    assert len({t.learning_rate for t in drawn}) > 40
    for trainer in drawn:
        assert trainer.link.boundary_steps >= MIN_BOUNDARY_STEPS == WINDOW_STEPS
        logits = make_model(trainer, (1, 8))(torch.zeros(2, 1, 8, 8))
        assert logits.shape == (2, 10)


def test_plan_trains() -> None:
    trainer = draw_plan(CORPUS, 0).trainer
    first = BranchTrainer(trainer).train(4, replay_commands([]))
    assert BranchTrainer(trainer).train(4, replay_commands([])) == first > 0.2, "chance is one in ten"


def test_missing_cifar_is_left_out_with_a_reason(tmp_path: Path) -> None:
    assert find_cifar(None) == (None, "no folder was named for CIFAR-10")
    assert find_cifar(tmp_path)[0] is None
    assert "there is no" in find_cifar(tmp_path)[1]
    with pytest.raises(UnavailableError, match="download CIFAR-10"):
        load_cifar10(tmp_path, 10, 0)
    with_cifar = CorpusSettings(seed=3, folder=Path("runs"), cifar=tmp_path)
    kinds = {draw_plan(with_cifar, n).trainer.dataset for n in range(40)}
    assert kinds == {"digits", "cifar10"}


def test_cifar_is_read_from_the_file_then_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reason = find_cifar(DATA)
    if folder is None:
        pytest.skip(reason)
    monkeypatch.setenv("ESPER_STATE_DIR", str(tmp_path))
    read, again = (load_cifar10(folder, 40, 3) for _n in range(2))
    assert read.train_x.shape == (30, 3, 32, 32)
    assert read.val_y.shape == (10,)
    assert torch.equal(read.train_x, again.train_x)
    assert 0 < float(read.train_x.std()) < 2
    assert len(list((tmp_path / "decoded").iterdir())) == 1


def test_random_policy_waits_with_its_share() -> None:
    choices = [WAIT, *[Choice(Action.GERMINATE)] * 30, Choice(Action.CULL), Choice(Action.FOSSILIZE)]
    weights = RandomPolicy(0.7).distribution(None, choices).probabilities  # type: ignore[arg-type]
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights[0] == 0.7
    assert weights[32] == pytest.approx(30 * weights[1]) == pytest.approx(0.3 / (2 + CULL))
    assert weights[31] == pytest.approx(CULL * weights[32])
    assert RandomPolicy(0.7).distribution(None, [WAIT]).probabilities == {0: 1.0}  # type: ignore[arg-type]
    alike = RandomPolicy().distribution(None, choices).probabilities  # type: ignore[arg-type]
    assert set(alike.values()) == {1 / 33}


def test_random_policy_seldom_culls_before_evaluation() -> None:
    seeds = [
        SeedView("fc1", n, s, 0, None, 0, None, NO_HEALTH)
        for n, s in enumerate((SeedStage.TRAINING, SeedStage.EVALUATING))
    ]
    choices = [WAIT, *[Choice(Action.CULL, s) for s in seeds], Choice(Action.FOSSILIZE, seeds[1])]
    weights = RandomPolicy(0.5).distribution(None, choices).probabilities  # type: ignore[arg-type]
    each = 0.5 / (1 + CULL + EARLY_CULL)
    assert weights == pytest.approx({0: 0.5, 1: EARLY_CULL * each, 2: CULL * each, 3: each})
