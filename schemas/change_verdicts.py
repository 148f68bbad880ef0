"""The one fold of requested blueprint changes, for every reader: API, worker, replay."""

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
"""From which states a change is allowed (None: not there yet), and where it leads."""


def judge(blueprint: Blueprint | None, request: BlueprintChangeRequested) -> tuple[Verdict, Blueprint | None]:
    """What becomes of a request, and the blueprint after it (unchanged unless accepted).

    A request seen before keeps its first verdict: that is the reader's to remember, by id.
    """
    if request.expected_version != (blueprint.version if blueprint else 0):
        return Verdict.WRONG_VERSION, blueprint
    allowed_from, status = CHANGES[request.change]
    if (blueprint.status if blueprint else None) not in allowed_from:
        return Verdict.NOT_ALLOWED, blueprint
    spec = request.spec or (blueprint.spec if blueprint else None)
    assert spec is not None, "a proposal brings its spec, every other change has a blueprint"
    return Verdict.ACCEPTED, Blueprint(
        blueprint_id=request.blueprint_id,
        version=request.expected_version + 1,
        status=status,
        spec=spec,
    )
