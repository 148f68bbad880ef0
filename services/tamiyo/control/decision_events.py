"""Events of a decision: the view it is based on, the decision, and the command that carries it out.

Pure. Ids follow from (run, incarnation, boundary), so a repeated decision for a boundary has the same id.
"""

from uuid import UUID

from esper.graph.graph_view import GraphView
from esper.graph.view_features import VIEW_VERSION
from esper.schemas import ids
from esper.schemas.enums import Action
from esper.schemas.events import (
    AnyCommand,
    CullSeed,
    DecisionMade,
    FossilizeSeed,
    GerminateSeed,
    RunEvent,
    ViewRecorded,
)
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.control.recorded_view import pack_view
from esper.services.tamiyo.policies import SampledChoice
from esper.services.tamiyo.policies.active_policy import ActivePolicy
from esper.streams.read_models.pending_boundaries import PendingBoundary, UncommandedDecision

SOURCE = "tamiyo"
MAX_REASON_CHARS = 2000  # the contract's limit
STALE_REASON = "wait: the view was still incomplete after {:.1f} s"
FAILED_VIEW_REASON = "wait: the view of this boundary cannot be made ({:.500})"


def view_message(view: GraphView, pending: PendingBoundary) -> OonaMessage:
    """Return the event with the exact bytes of the view that a decision is based on."""
    event = ViewRecorded(
        run_id=view.run_id,
        incarnation=view.incarnation,
        boundary=view.boundary,
        view_version=VIEW_VERSION,
        digest=view.digest,
        view_zstd=pack_view(view),
    )
    return _caused_by_boundary(event, ids.view_id(view.run_id, view.incarnation, view.boundary), pending)


def decision_message(
    pending: PendingBoundary, sampled: SampledChoice, view: GraphView | None, active: ActivePolicy
) -> OonaMessage:
    """Return the decision for a boundary. Without a view it is a WAIT marked as stale."""
    seed, kernel = sampled.choice.seed, sampled.choice.kernel
    event = DecisionMade(
        run_id=pending.run_id,
        incarnation=pending.incarnation,
        boundary=pending.boundary,
        step=pending.step,
        action=sampled.choice.action,
        layer_id=seed.layer_id if seed else None,
        seed_id=seed.seed_id if seed else None,
        blueprint_id=kernel.blueprint_id if kernel else None,
        probability=min(1.0, sampled.probability),
        policy_id=active.version.policy_id,
        policy_version=active.version.version,
        reason=sampled.reason[:MAX_REASON_CHARS],
        view_digest=view.digest if view else None,
        stale=view is None,
    )
    return _caused_by_boundary(event, ids.decision_id(pending.run_id, pending.incarnation, pending.boundary), pending)


def command_message(
    decision: DecisionMade | UncommandedDecision,
    choice: Choice,
    expiry_boundaries: int,
    *,
    decision_id: UUID,
    traceparent: str | None,
) -> OonaMessage:
    """Return the command that carries out a decision.

    Args:
        choice: the decided choice, from the view that the decision names; not WAIT.
        expiry_boundaries: for how many boundaries the command stays valid.
    """
    assert choice.seed is not None
    steps_per_boundary = max(1, decision.step // decision.boundary)
    common = {
        "run_id": decision.run_id,
        "incarnation": decision.incarnation,
        "boundary": decision.boundary,
        "decision_id": decision_id,
        "layer_id": choice.seed.layer_id,
        "seed_id": choice.seed.seed_id,
        "expires_at_step": decision.step + expiry_boundaries * steps_per_boundary,
    }
    event: AnyCommand
    match choice.action:
        case Action.GERMINATE:
            assert choice.kernel is not None
            kernel = {
                "blueprint_id": choice.kernel.blueprint_id,
                "blueprint_version": choice.kernel.blueprint_version,
                "kernel_sha256": choice.kernel.kernel_sha256,
                "kernel_size_bytes": choice.kernel.size_bytes,
            }
            event = GerminateSeed.model_validate({**common, **kernel})
        case Action.FOSSILIZE:
            event = FossilizeSeed.model_validate(common)
        case _:
            event = CullSeed.model_validate({**common, "expected_stage": choice.seed.stage})
    return OonaMessage.of(
        event, id=ids.command_id(decision_id), source=SOURCE, causation_id=decision_id, traceparent=traceparent
    )


def _caused_by_boundary(event: RunEvent, id: UUID, pending: PendingBoundary) -> OonaMessage:
    return OonaMessage.of(event, id=id, source=SOURCE, causation_id=pending.event_id, traceparent=pending.traceparent)
