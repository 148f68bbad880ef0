"""The events of a decision: a command that is sent again equals the first one, whatever was decided."""

import random
import uuid
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st
from support.data.random_views import drawn_view

from esper.schemas.events import DecisionMade
from esper.services.tamiyo.control.decision_events import command_message, decision_message
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.policies import EpsilonSoft, SampledChoice
from esper.services.tamiyo.policies.active_policy import ActivePolicy
from esper.services.tamiyo.policies.baselines import WaitPolicy
from esper.streams.read_models.pending_boundaries import PendingBoundary, UncommandedDecision
from esper.streams.read_models.policy_versions import PolicyVersion

ACTIVE = ActivePolicy(PolicyVersion("wait", 1, "wait", {}), EpsilonSoft(WaitPolicy(), 0.05, 0))
COPIED = ("run_id", "incarnation", "boundary", "step", "action", "layer_id", "seed_id", "blueprint_id")


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_resent_command_equals_the_first_one(seed: int, num_layers: int) -> None:
    """The projections keep the names of a choice; the view gives kernel and stage. No setting takes part in it."""
    view = drawn_view(random.Random(seed), num_layers)
    pending = PendingBoundary(
        view.run_id, view.incarnation, view.boundary, view.step, 0, uuid.UUID(int=1), None, datetime.now(UTC), True
    )
    choices = legal_choices(view)
    for choice in list(choices)[1:]:
        message = decision_message(pending, SampledChoice(choice, 0.5, "test"), view, ACTIVE)
        assert isinstance(message.data, DecisionMade)
        names = {name: getattr(message.data, name) for name in COPIED}
        stored = UncommandedDecision(
            **names, event_id=message.id, traceparent=None, view_digest=view.digest, view_partition=0, view_offset=0
        )
        index = choices.find(stored)
        assert index is not None
        first, resent = (
            command_message(decision, of, 6, decision_id=message.id, traceparent=None)
            for decision, of in ((message.data, choice), (stored, choices[index]))
        )
        assert (resent.id, resent.causation_id, resent.data) == (first.id, first.causation_id, first.data)
