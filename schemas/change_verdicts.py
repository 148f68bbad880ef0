"""The verdict on requested blueprint changes, computed alike by every reader: API, worker and replay."""

from collections.abc import Mapping
from types import MappingProxyType

from esper.schemas.assets import Blueprint
from esper.schemas.enums import BlueprintChange as C
from esper.schemas.enums import BlueprintStatus as S
from esper.schemas.enums import Verdict
from esper.schemas.events.blueprints import BlueprintChangeRequested

CHANGES: Mapping[C, tuple[frozenset[S | None], S]] = MappingProxyType(
    {
        C.PROPOSE: (frozenset({None, S.REJECTED}), S.PROPOSED),
        C.COMPILE: (frozenset({S.PROPOSED}), S.COMPILED),
        C.CERTIFY: (frozenset({S.COMPILED}), S.CERTIFIED),
        C.REJECT: (frozenset({S.PROPOSED, S.COMPILED}), S.REJECTED),
        C.RETIRE: (frozenset({S.CERTIFIED}), S.RETIRED),
    }
)
"""Change -> the statuses that allow it (None: the blueprint does not exist), and the status after it."""


def judge(blueprint: Blueprint | None, request: BlueprintChangeRequested) -> tuple[Verdict, Blueprint | None]:
    """The verdict on a request, and the blueprint after it (unchanged unless accepted).

    A repeated request keeps its first verdict; the reader has to store the verdicts by request id.
    """
    if request.expected_version != (blueprint.version if blueprint else 0):
        return Verdict.WRONG_VERSION, blueprint
    allowed_from, status = CHANGES[request.change]
    if (blueprint.status if blueprint else None) not in allowed_from:
        return Verdict.NOT_ALLOWED, blueprint
    spec = request.spec or (blueprint.spec if blueprint else None)
    assert spec is not None, "a proposal has a spec, and every other change has a blueprint"
    return Verdict.ACCEPTED, Blueprint(
        blueprint_id=request.blueprint_id,
        version=request.expected_version + 1,
        status=status,
        spec=spec,
    )
