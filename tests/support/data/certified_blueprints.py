"""The shipped blueprints certified by three requests each, for tests that need kernels to choose from and no Urza."""

from esper.schemas import ids
from esper.schemas.enums import BlueprintChange
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.messages import OonaMessage
from esper.services.urza.kernels.shipped_blueprints import shipping_proposals


def certified_at_once() -> list[OonaMessage]:
    """What takes every shipped blueprint to certified; the ids are Urza's own, so that one may run all the same."""
    proposals = shipping_proposals()
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
