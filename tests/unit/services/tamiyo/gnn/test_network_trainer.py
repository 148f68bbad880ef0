"""Training the policy: it learns, is reproducible to the bit, and can be resumed."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.data.random_experiences import NOISE, experiences, stored, strain, true_gain

from esper.errors import ConfigError, ContractError
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.dataset.experiences import Experience, Experiences
from esper.services.tamiyo.gnn import policy_fit
from esper.services.tamiyo.gnn.gnn_policy import GnnPolicy
from esper.services.tamiyo.gnn.network_trainer import NetworkTrainer, TrainedNetwork, TrainingStep
from esper.services.tamiyo.gnn.policy_file import load_policy
from esper.services.tamiyo.gnn.settings import NetworkSettings, TrainingSettings
from esper.services.tamiyo.versions.retraining import FitProgress, FitSettings

TRAIN, HELD_OUT = experiences(range(60)), experiences(range(100, 125))
SHORT = TrainingSettings.model_validate(
    {"width": 16, "num_batches": 12, "batch_size": 64, "eval_every": 4, "learning_rate": 0.01}
)


def fit(
    train: list[Experience],
    held_out: list[Experience],
    settings: TrainingSettings,
    on_step: Callable[[TrainingStep], None] = lambda _step: None,
) -> TrainedNetwork:
    return run_to_end(NetworkTrainer(train, held_out, settings), on_step)


def run_to_end(trainer: NetworkTrainer, on_step: Callable[[TrainingStep], None] = lambda _step: None) -> TrainedNetwork:
    while not trainer.is_done:
        on_step(trainer.step())
    return trainer.trained()


def test_policy_generalizes_to_held_out_runs() -> None:
    settings = TrainingSettings.model_validate(
        {"num_batches": 60, "batch_size": 128, "learning_rate": 0.01, "dropout": 0.1, "weight_decay": 0.1}
    )
    steps: list[TrainingStep] = []
    trained = fit(TRAIN, HELD_OUT, settings, steps.append)
    assert trained.validation_loss < 0.75 * trained.baseline_loss
    assert len({s.batch for s in steps}) == len(steps)
    policy = GnnPolicy(trained.network, trained.blueprints, temperature=0.01, options=NetworkSettings(device="cpu"))
    picked, average = [], []
    for one in HELD_OUT:
        choices = legal_choices(one.view)
        gains = [true_gain(c, strain(one.view, c)) for c in choices]
        picked.append(gains[int(policy.gains([one.view])[0][0].argmax())])
        average.append(sum(gains) / len(gains))
    assert sum(picked) / len(picked) > sum(average) / len(average) + 0.01


def test_training_is_reproducible_to_the_bit() -> None:
    first, second = (fit(TRAIN[:200], HELD_OUT[:50], SHORT) for _n in range(2))
    other = fit(TRAIN[:200], HELD_OUT[:50], SHORT.model_copy(update={"rng_seed": 1}))
    weights = [t.network.state_dict() for t in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize("stop_at", [1, 7])
def test_resumed_training_equals_uninterrupted_training(stop_at: int) -> None:
    whole = fit(TRAIN[:200], HELD_OUT[:50], SHORT)
    stopped = NetworkTrainer(TRAIN[:200], HELD_OUT[:50], SHORT)
    for _n in range(stop_at):
        stopped.step()
    resumed = NetworkTrainer(TRAIN[:200], HELD_OUT[:50], SHORT)
    resumed.load_state_dict(stopped.state_dict())
    rest = run_to_end(resumed)
    assert rest.validation_loss == whole.validation_loss
    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.network.state_dict().items())


def test_noise_is_not_learned_and_training_stops_early() -> None:
    rng = random.Random(5)
    noise = [replace(e, reward=rng.gauss(0, NOISE) if e.chosen else 0.0) for e in TRAIN[:300]]
    held_out = [replace(e, reward=rng.gauss(0, NOISE) if e.chosen else 0.0) for e in HELD_OUT]
    settings = TrainingSettings.model_validate({"width": 16, "num_batches": 300, "eval_every": 2, "patience": 3})
    steps: list[TrainingStep] = []
    trained = fit(noise, held_out, settings, steps.append)
    assert len(steps) < 300
    assert trained.validation_loss > 0.97 * trained.baseline_loss


def test_missing_experiences_are_rejected() -> None:
    with pytest.raises(ContractError, match="0 experiences to train on"):
        fit([], HELD_OUT, SHORT)
    with pytest.raises(ContractError, match="0 to validate on"):
        fit(TRAIN, [], SHORT)


# with `esper tamiyo retrain`


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 8, "NUM_BATCHES": 10, "BATCH_SIZE": 32, "EVAL_EVERY": 5}.items():
        monkeypatch.setenv(f"ESPER_TAMIYO__TRAINING__{name}", str(value))


LOG = Experiences(stored(e) for e in TRAIN[:120])


@pytest.mark.usefixtures("quick")
def test_resumed_fit_gives_the_same_file(tmp_path: Path) -> None:
    def until(batch: int) -> Callable[[FitProgress], None]:
        def on_progress(progress: FitProgress) -> None:
            if progress.num_batches == batch:
                raise KeyboardInterrupt

        return on_progress

    folders = [tmp_path / "whole", tmp_path / "resumed"]
    whole = policy_fit.fit(LOG, FitSettings(rng_seed=4), lambda _progress: None)
    kept = FitSettings(rng_seed=4, resume_from=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        policy_fit.fit(LOG, kept, until(8))
    progress: list[FitProgress] = []
    resumed = policy_fit.fit(LOG, kept, progress.append)
    assert [p.num_batches for p in progress] == [6, 7, 8, 9, 10], "from the last evaluation"
    for folder, fitted in zip(folders, (whole, resumed), strict=True):
        folder.mkdir()
        fitted.save(folder, {"seed": 4})
    assert (folders[0] / "policy.safetensors").read_bytes() == (folders[1] / "policy.safetensors").read_bytes()
    card = json.loads((folders[0] / "card.json").read_text())
    assert card["training"]["experiences_digest"] == LOG.digest
    policy = load_policy((folders[0] / "policy.safetensors").read_bytes(), card["policy_sha256"])
    view, choices = TRAIN[0].view, legal_choices(TRAIN[0].view)
    assert policy.distribution(view, choices).probabilities == pytest.approx(
        whole.policy.distribution(view, choices).probabilities
    )
    (rewards,) = whole.predict_rewards([view], [choices])
    assert rewards[0] == 0.0
    assert len(rewards) == len(choices)


@pytest.mark.usefixtures("quick")
def test_state_of_another_training_or_damaged_is_rejected(tmp_path: Path) -> None:
    policy_fit.fit(LOG, FitSettings(rng_seed=4, resume_from=tmp_path), lambda _progress: None)
    with pytest.raises(ConfigError, match="belongs to other experiences, settings or inputs: delete it"):
        policy_fit.fit(LOG, FitSettings(rng_seed=5, resume_from=tmp_path), lambda _progress: None)
    (tmp_path / "training.pt").write_bytes(b"no state")
    with pytest.raises(ConfigError, match="is damaged: delete it to start again"):
        policy_fit.fit(LOG, FitSettings(rng_seed=4, resume_from=tmp_path), lambda _progress: None)
