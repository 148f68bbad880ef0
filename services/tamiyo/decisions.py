"""From a choice to events: the view that was seen, the decision, the command that carries it out.

Pure: ids follow from (run, incarnation, boundary), so that saying it twice says the same thing.
"""

import base64
from uuid import UUID

import zstandard

from esper.graph.features import VIEW_VERSION
from esper.graph.view import GraphView
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
from esper.services.tamiyo.policies import Chosen
from esper.services.tamiyo.settings import TamiyoSettings
from esper.streams.views import PendingBoundary, UnsentDecision

SOURCE = "tamiyo"
STALE_REASON = "the views did not become complete within {:.1f} s: nothing is decided on half a picture"


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


def made_decision(view: GraphView, chosen: Chosen, pending: PendingBoundary, tamiyo: TamiyoSettings) -> OonaMessage:
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
        policy_id=tamiyo.policy,
        policy_version=tamiyo.policy_version,
        reason=chosen.reason,
        view_digest=view.digest,
    )
    return _caused_by_boundary(event, _decision_id(pending), pending)


def stale_decision(pending: PendingBoundary, tamiyo: TamiyoSettings) -> OonaMessage:
    """WAIT, because the views are behind."""
    event = DecisionMade(
        run_id=pending.run_id,
        incarnation=pending.incarnation,
        boundary=pending.boundary,
        step=pending.step,
        action=Action.WAIT,
        probability=1.0,
        policy_id=tamiyo.policy,
        policy_version=tamiyo.policy_version,
        reason=STALE_REASON.format(tamiyo.stale_after_s),
        stale=True,
    )
    return _caused_by_boundary(event, _decision_id(pending), pending)


def unsent_of(decision: OonaMessage, chosen: Chosen) -> UnsentDecision | None:
    """What its command is made of; None for WAIT."""
    event, seed, kernel = decision.data, chosen.choice.seed, chosen.choice.kernel
    if not isinstance(event, DecisionMade) or seed is None:
        return None
    return UnsentDecision(
        run_id=event.run_id,
        incarnation=event.incarnation,
        boundary=event.boundary,
        step=event.step,
        action=event.action,
        layer_id=seed.layer_id,
        seed_id=seed.seed_id,
        blueprint_id=event.blueprint_id,
        event_id=decision.id,
        traceparent=decision.traceparent,
        blueprint_version=kernel.blueprint_version if kernel else None,
        kernel_sha256=kernel.kernel_sha256 if kernel else None,
        size_bytes=kernel.size_bytes if kernel else None,
        stage=seed.stage,
    )


def command_for(decision: UnsentDecision, expiry_boundaries: int) -> OonaMessage:
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
            stage = decision.stage or SeedStage.TRAINING
            event = CullSeed.model_validate({**common, "expected_stage": stage})
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
