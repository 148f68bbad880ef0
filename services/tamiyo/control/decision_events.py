"""From a choice to events: the view that was seen, the decision, the command that carries it out.

Pure: ids follow from (run, incarnation, boundary), so that saying it twice says the same thing.
"""

import base64
from dataclasses import dataclass
from uuid import UUID

import zstandard

from esper.graph.features import VIEW_VERSION
from esper.graph.graph_view import GraphView, KernelView, SeedView
from esper.schemas import ids
from esper.schemas.enums import Action, SeedStage
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
from esper.services.tamiyo.policies import SampledChoice
from esper.services.tamiyo.policies.active_policy import ActivePolicy
from esper.streams.read_models.pending_boundaries import PendingBoundary, UncommandedDecision

SOURCE = "tamiyo"
STALE_REASON = "the views did not become complete within {:.1f} s: nothing is decided on half a picture"
MAX_REASON_CHARS = 2000  # what the contract allows
BROKEN_REASON = "the view of this boundary cannot be made, so nothing is done: {:.500}"


@dataclass(frozen=True, slots=True)
class DecisionWithoutCommand:
    """What a command is made of. ``stage`` is the seed's when it was decided."""

    run_id: str
    incarnation: int
    boundary: int
    step: int
    action: str
    layer_id: str
    seed_id: int
    blueprint_id: str | None
    event_id: UUID
    traceparent: str | None
    blueprint_version: int | None
    kernel_sha256: str | None
    size_bytes: int | None
    stage: SeedStage


def recorded_view(view: GraphView, pending: PendingBoundary) -> OonaMessage:
    """The exact bytes that the decision sees."""
    event = ViewRecorded(
        run_id=view.run_id,
        incarnation=view.incarnation,
        boundary=view.boundary,
        view_version=VIEW_VERSION,
        digest=view.digest,
        view_zstd=base64.b64encode(zstandard.compress(view.to_bytes())),
    )
    return _caused_by_boundary(event, ids.view_id(view.run_id, view.incarnation, view.boundary), pending)


def decision_message(
    view: GraphView, chosen: SampledChoice, pending: PendingBoundary, active: ActivePolicy
) -> OonaMessage:
    """The decision for a complete boundary."""
    seed, kernel = chosen.choice.seed, chosen.choice.kernel
    event = DecisionMade(
        run_id=view.run_id,
        incarnation=view.incarnation,
        boundary=view.boundary,
        step=view.step,
        action=chosen.choice.action,
        layer_id=seed.layer_id if seed else None,
        seed_id=seed.seed_id if seed else None,
        blueprint_id=kernel.blueprint_id if kernel else None,
        probability=min(1.0, chosen.probability),
        policy_id=active.policy_id,
        policy_version=active.version,
        reason=chosen.reason[:MAX_REASON_CHARS],
        view_digest=view.digest,
    )
    return _caused_by_boundary(event, _decision_id(pending), pending)


def wait_without_view(pending: PendingBoundary, active: ActivePolicy, reason: str) -> OonaMessage:
    """WAIT without a view: the rows are behind, or no view can be made of them. ``reason`` says which."""
    event = DecisionMade(
        run_id=pending.run_id,
        incarnation=pending.incarnation,
        boundary=pending.boundary,
        step=pending.step,
        action=Action.WAIT,
        probability=1.0,
        policy_id=active.policy_id,
        policy_version=active.version,
        reason=reason,
        stale=True,
    )
    return _caused_by_boundary(event, _decision_id(pending), pending)


def unsent_of(decision: OonaMessage, chosen: SampledChoice) -> DecisionWithoutCommand | None:
    """What its command is made of; None for WAIT."""
    event, seed, kernel = decision.data, chosen.choice.seed, chosen.choice.kernel
    if not isinstance(event, DecisionMade) or seed is None:
        return None
    return _unsent(event, seed, kernel, decision.id, decision.traceparent)


def unsent_again(undone: UncommandedDecision, view: GraphView) -> DecisionWithoutCommand | None:
    """The same of a decision in the log and the view that it saw; None where that does not offer what was decided."""
    layer = next((one for one in view.layers if one.layer_id == undone.layer_id), None)
    place = (undone.layer_id, undone.seed_id)
    seed = next((one for one in view.seeds if (one.layer_id, one.seed_id) == place), None)
    if layer is None or seed is None:
        return None
    fitting = (undone.blueprint_id, layer.kind, layer.num_features)
    kernel = next((k for k in view.kernels if (k.blueprint_id, k.target, k.num_features) == fitting), None)
    if undone.action == Action.GERMINATE and kernel is None:
        return None
    return _unsent(undone, seed, kernel, undone.event_id, undone.traceparent)


def _unsent(
    decision: DecisionMade | UncommandedDecision,
    seed: SeedView,
    kernel: KernelView | None,
    event_id: UUID,
    traceparent: str | None,
) -> DecisionWithoutCommand:
    return DecisionWithoutCommand(
        run_id=decision.run_id,
        incarnation=decision.incarnation,
        boundary=decision.boundary,
        step=decision.step,
        action=decision.action,
        layer_id=seed.layer_id,
        seed_id=seed.seed_id,
        blueprint_id=decision.blueprint_id,
        event_id=event_id,
        traceparent=traceparent,
        blueprint_version=kernel.blueprint_version if kernel else None,
        kernel_sha256=kernel.kernel_sha256 if kernel else None,
        size_bytes=kernel.size_bytes if kernel else None,
        stage=seed.stage,
    )


def command_for(decision: DecisionWithoutCommand, expiry_boundaries: int) -> OonaMessage:
    """The command that carries a decision out."""
    steps_per_boundary = max(1, decision.step // decision.boundary)
    common = {
        "run_id": decision.run_id,
        "incarnation": decision.incarnation,
        "boundary": decision.boundary,
        "decision_id": decision.event_id,
        "layer_id": decision.layer_id,
        "seed_id": decision.seed_id,
        "expires_at_step": decision.step + expiry_boundaries * steps_per_boundary,
    }
    event: AnyCommand
    match decision.action:
        case Action.GERMINATE:
            kernel = {
                "blueprint_id": decision.blueprint_id,
                "blueprint_version": decision.blueprint_version,
                "kernel_sha256": decision.kernel_sha256,
                "kernel_size_bytes": decision.size_bytes,
            }
            event = GerminateSeed.model_validate({**common, **kernel})
        case Action.FOSSILIZE:
            event = FossilizeSeed.model_validate(common)
        case _:
            event = CullSeed.model_validate({**common, "expected_stage": decision.stage})
    return OonaMessage.of(
        event,
        id=ids.command_id(decision.event_id),
        source=SOURCE,
        causation_id=decision.event_id,
        traceparent=decision.traceparent,
    )


def _decision_id(pending: PendingBoundary) -> UUID:
    return ids.decision_id(pending.run_id, pending.incarnation, pending.boundary)


def _caused_by_boundary(event: RunEvent, id: UUID, pending: PendingBoundary) -> OonaMessage:
    return OonaMessage.of(event, id=id, source=SOURCE, causation_id=pending.event_id, traceparent=pending.traceparent)
