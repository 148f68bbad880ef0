"""/changes: requests for changes of blueprints. The log takes a request, the projection gives its verdict.

``BlueprintChanges`` owns the path of a request; these routes translate it to HTTP.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Header, Path, Request, Response
from pydantic import ConfigDict, Field, model_validator

from esper.logging import incoming_trace
from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.base import MAX_INT32, BlueprintId, Remark
from esper.schemas.enums import BlueprintChange, Verdict
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.events.blueprints import SPEC_ONLY_WITH_PROPOSE, check_spec
from esper.schemas.topics import BLUEPRINTS
from esper.services.urza.api.api_context import api_context
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.parameters import BlueprintPath, NoParameters, QueryOf
from esper.services.urza.api.problems import not_found
from esper.services.urza.api.response_cache import json_response
from esper.services.urza.blueprint_changes import ChangeOutcome
from esper.services.urza.kernels.shipped_blueprints import SOURCE

MAX_CHANGES = 100  # of one request

router = APIRouter(tags=["changes"])
nested = APIRouter(prefix="/blueprints", tags=["changes"])

IdempotencyKey = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[A-Za-z0-9._~:-]{8,200}$",
        description="Identifies this request: a second one with the same key changes nothing.",
    ),
]
ChangePath = Annotated[
    UUID,
    Path(description="The change's event.", examples=[str(ids.request_id("shipped:noop:propose"))]),
]
Traceparent = Annotated[str | None, Header(description="W3C Trace Context: the event joins this trace.")]


class ChangeRequest(ApiModel):
    """A change of a blueprint; ``expected_version`` is the version that the caller saw, 0 for a new one."""

    model_config = ConfigDict(
        json_schema_extra={
            **SPEC_ONLY_WITH_PROPOSE,
            "example": {"change": "retire", "expected_version": 3, "reason": "superseded by low-rank-8"},
        },
    )

    change: BlueprintChange
    expected_version: Annotated[int, Field(ge=0, lt=MAX_INT32)]
    spec: BlueprintSpec | None = None
    reason: Remark = ""

    @model_validator(mode="after")
    def _check_spec(self) -> Self:
        check_spec(self.change, self.spec)
        return self


class NamedChangeRequest(ChangeRequest):
    """A change with the blueprint's id."""

    blueprint_id: BlueprintId


class ChangesRequest(ApiModel):
    """Several changes; each has its own verdict."""

    changes: Annotated[list[NamedChangeRequest], Field(min_length=1, max_length=MAX_CHANGES)]


class ChangeResponse(ApiModel):
    """A requested change and its verdict."""

    event_id: UUID
    blueprint_id: str
    change: BlueprintChange
    expected_version: int
    verdict: Verdict
    version_after: int | None
    reason: str
    causation_id: UUID | None = Field(description="The event that caused it, such as the certificate.")
    log_offset: int
    at: datetime


class PendingChange(ApiModel):
    """A change that is in the log and not projected yet: ``status`` is the address of its verdict."""

    event_id: UUID
    status: str


class ChangeQuery(ApiModel):
    """Chooses among changes with one id: a key that is sent to two processes at the same time can have two."""

    blueprint_id: BlueprintId | None = Field(None, description="The change of this blueprint.")


class ChangesResponse(ApiModel):
    """The verdicts in the order of the request; for pending changes, their addresses."""

    changes: list[ChangeResponse | PendingChange]


@nested.post("/{blueprint_id}/changes", response_model=ChangeResponse, responses={202: {"model": PendingChange}})
async def request_change(
    request: Request,
    blueprint_id: BlueprintPath,
    body: ChangeRequest,
    key: IdempotencyKey,
    _: NoParameters,
    traceparent: Traceparent = None,
) -> Response:
    """Request a change and wait for its verdict: 200 once it is projected, 202 where that takes longer."""
    change = BlueprintChangeRequested(blueprint_id=blueprint_id, **body.model_dump())
    (outcome,) = await _request(request, [change], key, traceparent)
    content = _content(outcome)
    response = json_response(request, content, ())
    if outcome.row is None:
        response.status_code = 202
        response.headers["Location"] = content["status"]
    return response


@router.post("/changes", response_model=ChangesResponse, responses={202: {"model": ChangesResponse}})
async def request_changes(
    request: Request, body: ChangesRequest, key: IdempotencyKey, _: NoParameters, traceparent: Traceparent = None
) -> Response:
    """Request up to 100 changes, each judged separately: 200 once all are projected, otherwise 202."""
    changes = [BlueprintChangeRequested(**change.model_dump()) for change in body.changes]
    outcomes = await _request(request, changes, key, traceparent)
    response = json_response(request, {"changes": [_content(outcome) for outcome in outcomes]}, ())
    response.status_code = 202 if any(outcome.row is None for outcome in outcomes) else 200
    return response


@router.get("/changes/{event_id}", response_model=ChangeResponse)
async def show_change(request: Request, event_id: ChangePath, query: QueryOf[ChangeQuery]) -> Response:
    """One change with its verdict; 404 while it is not projected."""
    judged = await api_context(request).urza.changes.judged([event_id])
    found = judged.get(event_id, {})
    row = next(iter(found.values()), None) if query.blueprint_id is None else found.get(query.blueprint_id)
    if row is None:
        raise not_found("projected change", event_id)
    return json_response(request, row, [BLUEPRINTS.name])


async def _request(
    request: Request, changes: Sequence[BlueprintChangeRequested], key: str, traceparent: str | None
) -> list[ChangeOutcome]:
    """Raises as ``BlueprintChanges.request``."""
    context = api_context(request)
    try:
        return await context.urza.changes.request(
            changes,
            key=key,
            source=f"{SOURCE}/api",
            timeout_s=context.urza.settings.change_timeout_s,
            traceparent=incoming_trace(traceparent),
        )
    finally:
        context.versions.expire()  # the requester reads its own write


def _content(outcome: ChangeOutcome) -> dict[str, Any]:
    if outcome.row is not None:
        return outcome.row
    address = f"/changes/{outcome.event_id}?blueprint_id={outcome.request.blueprint_id}"
    return {"event_id": outcome.event_id, "status": address}
