"""Retraining: a stable split, a clear error without a fit, and evaluation on the held-out runs."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.data.decided_runs import RENT, generate_run, lay_out
from typer.testing import CliRunner

from esper.cli.app import app
from esper.errors import ConfigError
from esper.graph.graph_view import GraphView
from esper.schemas.enums import Action
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.dataset.experience_files import write_experiences
from esper.services.tamiyo.dataset.experience_join import ExperienceJoin, join_experiences
from esper.services.tamiyo.dataset.experiences import Experiences, StoredExperience
from esper.services.tamiyo.dataset.record_index import RecordIndex
from esper.services.tamiyo.evaluation.off_policy import EvaluationSettings
from esper.services.tamiyo.evaluation.policy_evaluation import AS_LOGGED, baselines, evaluate, verdict_of
from esper.services.tamiyo.policies import ActionDistribution
from esper.services.tamiyo.policies.baselines import RandomPolicy
from esper.services.tamiyo.settings import TamiyoSettings
from esper.services.tamiyo.versions import retraining
from esper.services.tamiyo.versions.publication import SHIPPED
from esper.services.tamiyo.versions.retraining import FitProgress, FitSettings, find_fit, split_by_pattern, split_by_run

TAMIYO = TamiyoSettings.model_validate({})


def joined(num_runs: int, num_boundaries: int) -> ExperienceJoin:
    index = RecordIndex()
    for record in lay_out(
        [generate_run(f"r{n}", random.Random(n), num_boundaries) for n in range(num_runs)], random.Random(0)
    ):
        index.add(record)
    return join_experiences(index, RENT)


MANY = joined(20, 25)


def write(folder: Path, found: ExperienceJoin) -> None:
    """Write what `esper tamiyo replay --into` writes."""
    origin = {
        "from": "EARLIEST",
        "until": "",
        "patterns": [],
        "begins": {},
        "ends": {},
        "lost": {},
        "rent": RENT.model_dump(),
    }
    measured = {action: list(counts) for action, counts in found.measured.items()}
    write_experiences(folder, found.experiences, {**origin, "measured": measured})


# the split


@given(num_runs=st.integers(2, 20), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_run_stays_on_its_side_as_the_log_grows(num_runs: int, share: float, seed: int) -> None:
    some = MANY.experiences.of_runs([f"r{n}" for n in range(num_runs)])
    try:
        split, later = split_by_run(some, share, seed), split_by_run(MANY.experiences, share, seed)
    except ConfigError:
        return  # one side is empty; the next test has the message
    assert set(split.train.runs).isdisjoint(split.held_out.runs)
    assert sorted([*split.train.stored, *split.held_out.stored], key=lambda e: e.key) == list(some.stored)
    assert set(split.held_out.runs) <= set(later.held_out.runs)
    assert set(split.train.runs) <= set(later.train.runs)


def test_empty_side_is_rejected() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(ConfigError, match="replay more runs, or change --held-out or --seed"):
            split_by_run(MANY.experiences, share, 0)


def test_approximately_the_share_is_held_out() -> None:
    (one, *_rest) = MANY.experiences.stored
    fields = {name: getattr(one, name) for name in one.__dataclass_fields__}
    many = Experiences(StoredExperience(**{**fields, "run_id": f"x{n}"}) for n in range(2_000))
    held = len(split_by_run(many, 0.2, 0).held_out)
    assert held == pytest.approx(400, abs=60), "three standard errors are 54"


def test_runs_are_held_out_by_pattern() -> None:
    split = split_by_pattern(MANY.experiences, ["r1", "r1?"])
    assert set(split.held_out.runs) == {r for r in MANY.experiences.runs if r == "r1" or r[:-1] == "r1"}
    assert set(split.train.runs) == set(MANY.experiences.runs) - set(split.held_out.runs)
    with pytest.raises(ConfigError, match=r"corpus-9-\* leave 20 to train on and 0 held out.*change --held-out-runs"):
        split_by_pattern(MANY.experiences, ["corpus-9-*"])


# evaluation


def test_policies_are_evaluated_epsilon_soft() -> None:
    found = evaluate(
        MANY.experiences,
        baselines(TAMIYO),
        epsilon=0.1,
        measured={},
        settings=EvaluationSettings(min_samples=1, max_thin_share=1.0, min_ess=1.0),
        candidate="random",
    )
    assert set(found.estimates) == {AS_LOGGED, "wait", "random", "schedule", "heuristic"}
    mean = sum(e.reward for e in MANY.experiences.stored) / len(MANY.experiences)
    for name in (AS_LOGGED, "random"):  # the random policy decided the stories
        assert found.estimates[name].snips.value == pytest.approx(mean)
        assert found.estimates[name].ess == pytest.approx(len(MANY.experiences))
    assert [d.than for d in found.differences] == [AS_LOGGED, "wait", "schedule", "heuristic"]
    assert json.loads(json.dumps(found.to_dict()))["judged"]["wait"]["is_supported"] is True


def test_verdict_has_the_fields_of_the_event() -> None:
    found, thin = (
        evaluate(
            MANY.experiences,
            baselines(TAMIYO),
            epsilon=0.1,
            measured={},
            settings=settings,
            candidate="random",
        )
        for settings in (
            EvaluationSettings(min_samples=1, max_thin_share=1.0, min_ess=1.0),
            EvaluationSettings(min_runs=99),
        )
    )
    verdict = verdict_of(found, found.differences[1], MANY.experiences.runs, level=0.95)
    interval = found.differences[1].snips
    assert (verdict["estimator"], verdict["estimate"], verdict["low"]) == ("snips", interval.value, interval.low)
    assert verdict["verdict"] == ("better" if interval.low > 0 else "not_better")
    assert (verdict["num_decisions"], verdict["held_out_runs"]) == (len(MANY.experiences), list(MANY.experiences.runs))
    refused = verdict_of(thin, thin.differences[1], MANY.experiences.runs, level=0.95)
    assert (refused["verdict"], refused["estimate"]) == ("too_thin", None)
    assert f"random: {len(MANY.experiences.runs)} runs, 99 are needed" in refused["reason"]


def test_rarely_measured_actions_weigh_more() -> None:
    assert MANY.measured[Action.GERMINATE][0] < MANY.measured[Action.GERMINATE][1]
    unweighted, weighted = (
        evaluate(MANY.experiences, {"random": RandomPolicy()}, epsilon=0.1, measured=measured)
        for measured in ({}, MANY.measured)
    )
    assert unweighted.estimates["random"].max_weight == pytest.approx(1.0)
    shares = [num_measured / num_eligible for num_measured, num_eligible in MANY.measured.values()]
    assert weighted.estimates["random"].max_weight == pytest.approx(1 / min(shares))


def test_policy_is_called_in_batches() -> None:
    class Batched(RandomPolicy):
        num_calls = 0

        def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
            raise AssertionError("all views were already scored in a batch")

        def distributions(
            self, views: Sequence[GraphView], choices: Sequence[Sequence[Choice]]
        ) -> list[ActionDistribution]:
            self.num_calls += 1
            return [RandomPolicy().distribution(view, some) for view, some in zip(views, choices, strict=True)]

    batched = Batched()
    estimates = [
        evaluate(MANY.experiences, {"it": policy}, epsilon=0.1, measured={}).estimates["it"]
        for policy in (batched, RandomPolicy())
    ]
    assert estimates[0] == estimates[1]
    assert batched.num_calls == 1


# a fit


class FakeFit:
    """Returns the random policy, and keeps its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Experiences, FitSettings]] = []

    def __call__(self, train: Experiences, settings: FitSettings, on_progress: Callable[[FitProgress], None]) -> Any:
        self.calls.append((train, settings))
        on_progress(FitProgress(1, 2, {"loss": 0.5}))

        def predict_rewards(views: Sequence[GraphView], choices: Sequence[Sequence[Choice]]) -> list[list[float]]:
            return [[0.0] * len(some) for some in choices]

        def save(folder: Path, card: Mapping[str, Any]) -> None:
            (folder / "card.json").write_text(json.dumps(card))

        return SimpleNamespace(policy=RandomPolicy(), predict_rewards=predict_rewards, save=save)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"ESPER_KAFKA__BOOTSTRAP_SERVERS": "nowhere:1", "COLUMNS": "200"}).invoke(app, arguments)
    return result.exit_code, result.output + str(result.exception or "")


def test_retrain_evaluates_on_held_out_runs_and_writes_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = FakeFit()
    monkeypatch.setattr("esper.cli.tamiyo.retrain.find_fit", lambda: fit)
    write(tmp_path / "seen", MANY)
    into = tmp_path / "policy"
    code, printed = run(
        "tamiyo", "retrain", "--experiences", str(tmp_path / "seen"), "--into", str(into), "--held-out", "0.5", "--seed", "3",
        "--resume", str(tmp_path / "state"),
    )  # fmt: skip
    assert code == 0, printed
    split = split_by_run(MANY.experiences, 0.5, 3)
    ((train, settings),) = fit.calls
    assert train.stored == split.train.stored
    assert settings == FitSettings(3, tmp_path / "state", None)
    card = json.loads((into / "card.json").read_text())
    assert card["held_out"]["digest"] == split.held_out.digest
    assert card["train"]["runs"] == list(split.train.runs)
    assert card["evaluation"]["num_runs"] == len(split.held_out.runs)
    assert "candidate" in card["evaluation"]["judged"]
    assert "loss 0.5" in printed
    code, printed = run("tamiyo", "retrain", "--experiences", str(tmp_path / "seen"), "--into", str(into))
    assert code != 0
    assert "name a new folder" in printed
    code, printed = run(
        "tamiyo", "retrain", "--experiences", str(tmp_path / "seen"), "--into", str(tmp_path / "x"), "--runs", "a*"
    )
    assert "--experiences is a folder" in printed


def test_resumed_retrain_needs_the_same_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.cli.tamiyo.retrain.find_fit", FakeFit)
    write(tmp_path / "policy.experiences", MANY)
    command = (
        "tamiyo",
        "retrain",
        "--into",
        str(tmp_path / "policy"),
        "--resume",
        str(tmp_path / "state"),
        "--no-active",
    )
    code, printed = run(*command, "--runs", "a*")
    assert code != 0
    assert "was read with another --from, --until or --runs" in printed
    code, printed = run(*command, "--held-out", "0.5")
    assert code == 0, printed


def test_find_fit_reports_a_missing_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "FIT", "esper.services.tamiyo.nowhere.training:fit")
    with pytest.raises(ConfigError, match="nothing to train: this installation has no esper"):
        find_fit()
    monkeypatch.setattr(retraining, "FIT", "json:loads")
    assert find_fit() is json.loads  # type: ignore[comparison-overlap]


def test_evaluate_prints_an_estimate_for_every_policy(tmp_path: Path) -> None:
    write(tmp_path / "seen", MANY)
    code, printed = run("tamiyo", "evaluate", str(tmp_path / "seen"), "--candidate", "random", "-q")
    assert code == 0, printed
    assert f"{len(MANY.experiences)} held-out decisions of {len(MANY.experiences.runs)} runs" in printed
    for name in (AS_LOGGED, "wait", "random", "schedule", "heuristic"):
        assert f"│ {name}" in printed
    assert "random than wait:" in printed
    code, printed = run("tamiyo", "evaluate", str(tmp_path / "seen"), "--fitted", str(SHIPPED), "-q")
    assert code == 0, printed
    assert "fitted than wait:" in printed
    assert "by always saying no" in printed
    write(tmp_path / "few", joined(3, 4))
    code, printed = run("tamiyo", "evaluate", str(tmp_path / "few"), "-q")
    assert code == 0
    assert re.search("heuristic cannot be evaluated: [23] runs, 10 are needed", printed)
    assert "refused" in printed
    code, printed = run("tamiyo", "evaluate", str(tmp_path / "few"), "--candidate", "gnn")
    assert "--candidate gnn: no such policy; choose one of wait, random, schedule, heuristic" in printed
    code, printed = run("tamiyo", "evaluate", str(tmp_path / "nothing"))
    assert "holds no experiences" in printed
