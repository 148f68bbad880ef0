"""Requests that certify the shipped blueprints, for tests that need kernels but no Urza."""

from esper.schemas import ids
from esper.schemas.enums import BlueprintChange
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.messages import OonaMessage
from esper.services.urza.kernels.shipped_blueprints import shipped_proposals


def certified_at_once() -> list[OonaMessage]:
    """Return the requests that certify every shipped blueprint, with the ids of Urza, which may run too."""
    proposals = shipped_proposals()
    others = [
        OonaMessage.of(
            BlueprintChangeRequested(blueprint_id=p.data.blueprint_id, change=change, expected_version=version),
            id=ids.library_request_id(p.data.blueprint_id, version, change),
            source="test",
        )
        for version, change in ((1, BlueprintChange.COMPILE), (2, BlueprintChange.CERTIFY))
        for p in proposals
    ]
    return [*proposals, *others]
