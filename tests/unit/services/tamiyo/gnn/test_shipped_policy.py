"""The shipped policy: this program can run it, and its card has training data, results and limits."""

import hashlib
import random

import pytest
from support.data.random_views import drawn_view

from esper.schemas.events import PolicyEvaluated, PolicyTrained
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.gnn.policy_file import load_policy
from esper.services.tamiyo.gnn.settings import NetworkSettings
from esper.services.tamiyo.versions.publication import SHIPPED, messages_of, read_fitted


def test_shipped_policy_decides_on_models_of_any_size() -> None:
    fitted = read_fitted(SHIPPED)
    policy = load_policy(fitted.data, fitted.sha256, NetworkSettings(device="cpu"))
    for num_layers in (1, 7, 60):
        view = drawn_view(random.Random(num_layers), num_layers)
        choices = legal_choices(view)
        probabilities = policy.distribution(view, choices).probabilities
        assert sum(probabilities[n] for n in range(len(choices))) == pytest.approx(1.0)


def test_shipped_card_has_training_data_results_and_limits() -> None:
    fitted = read_fitted(SHIPPED)
    assert hashlib.sha256(fitted.data).hexdigest() == fitted.card["policy_sha256"]
    trained, *evaluated = (m.data for m in messages_of(fitted, "gnn", 1, None, 1, "shipped", "test"))
    assert isinstance(trained, PolicyTrained)
    assert trained.num_decisions > 1_000
    assert {e.against_policy_id for e in evaluated if isinstance(e, PolicyEvaluated)} == {
        "wait", "random", "schedule", "heuristic",
    }  # fmt: skip
    assert set(fitted.card["train"]["runs"]).isdisjoint(fitted.card["held_out"]["runs"])
    assert "not tried on others" in fitted.card["training"]["limits"]
    assert 0 < fitted.card["outcomes"]["low"] <= fitted.card["outcomes"]["accuracy"]
