"""/changes: what is asked of blueprints. The log takes the request, the projection gives the verdict.

Owns the way of a write: an event under an id that follows from the Idempotency-Key, then a wait for the
row that a worker folds. The same request under the same key has the same id, and so one verdict, however
often it is sent; another request under that key is a conflict. A verdict is one of an id and a blueprint.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Header, Path, Request, Response
from pydantic import ConfigDict, Field, model_validator

from esper.errors import ConflictError
from esper.logging import incoming_trace
from esper.oona.cloudevents import encode
from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.base import MAX_INT32, BlueprintId, Remark
from esper.schemas.enums import BlueprintChange, Verdict
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.events.blueprints import SPEC_ONLY_WITH_PROPOSE, check_spec
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import BLUEPRINTS
from esper.services.urza.api.api_context import Library, library_of
from esper.services.urza.api.pagination import RowModel
from esper.services.urza.api.parameters import PlainQuery, Queried
from esper.services.urza.api.problems import not_found
from esper.services.urza.api.projection_reader import Row
from esper.services.urza.api.response_cache import answer
from esper.services.urza.kernels.shipped_blueprints import SOURCE

POLL_S = 0.02
MAX_AT_ONCE = 100
MAX_REMEMBERED = 10_000

router = APIRouter(tags=["changes"])
nested = APIRouter(prefix="/blueprints", tags=["changes"])

IdempotencyKey = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[A-Za-z0-9._~:-]{8,200}$",
        description="Names this request: sent again under the same key it is not done again.",
    ),
]
ChangePath = Annotated[
    UUID,
    Path(description="The change's event.", examples=[str(ids.request_id("shipped:noop:propose"))]),
]
Traceparent = Annotated[str | None, Header(description="W3C Trace Context: the event joins this trace.")]


class ChangeAsked(RowModel):
    """What is asked of a blueprint; ``expected_version`` is the version that the caller saw, 0 for a new one."""

    model_config = ConfigDict(
        extra="forbid",
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
    def _a_proposal_has_a_spec(self) -> Self:
        check_spec(self.change, self.spec)
        return self


class ChangeOf(ChangeAsked):
    """The same, of the blueprint that it names."""

    blueprint_id: BlueprintId


class ChangesAsked(RowModel):
    """Changes that are asked for at once; each has its own verdict."""

    changes: Annotated[list[ChangeOf], Field(min_length=1, max_length=MAX_AT_ONCE)]


class ChangeShown(RowModel):
    """A change that was asked for, and its verdict."""

    event_id: UUID
    blueprint_id: str
    change: BlueprintChange
    expected_version: int
    verdict: Verdict
    version_after: int | None
    reason: str
    causation_id: UUID | None = Field(description="The event that led to it: the certificate of what was examined.")
    log_offset: int
    at: datetime


class ChangePending(RowModel):
    """A change that is in the log and not folded yet: ``status`` says where its verdict will be."""

    event_id: UUID
    status: str


class ChangeQuery(RowModel):
    """Which change, of those with this id: whoever sent one key to two processes at a time has two."""

    blueprint_id: BlueprintId | None = Field(None, description="That of this blueprint.")


class ChangesShown(RowModel):
    """The verdicts, in the order of the request; of those still pending, where they will be."""

    changes: list[ChangeShown | ChangePending]


@nested.post("/{blueprint_id}/changes", response_model=ChangeShown, responses={202: {"model": ChangePending}})
async def ask_for_change(
    request: Request,
    blueprint_id: Annotated[BlueprintId, Path(description="The blueprint's id.", examples=["low-rank-4"])],
    body: ChangeAsked,
    key: IdempotencyKey,
    _: PlainQuery,
    traceparent: Traceparent = None,
) -> Response:
    """Ask for a change and wait for its verdict: 200 once it is folded, 202 where that takes longer."""
    event = BlueprintChangeRequested(blueprint_id=blueprint_id, **body.model_dump())
    event_id = ids.request_id(key)
    row = (await _ask(library_of(request), {event_id: event}, traceparent))[event_id]
    pending = _pending(event_id, event)
    made = answer(request, row or pending, ())
    if row is None:
        made.status_code = 202
        made.headers["Location"] = pending["status"]
    return made


@router.post("/changes", response_model=ChangesShown, responses={202: {"model": ChangesShown}})
async def ask_for_changes(
    request: Request, body: ChangesAsked, key: IdempotencyKey, _: PlainQuery, traceparent: Traceparent = None
) -> Response:
    """Ask for up to 100 changes at once, each judged on its own: 200 once all are, else 202."""
    events = {
        ids.request_id(f"{key}#{n}"): BlueprintChangeRequested(**asked.model_dump())
        for n, asked in enumerate(body.changes)
    }
    found = await _ask(library_of(request), events, traceparent)
    made = answer(
        request, {"changes": [row or _pending(event_id, events[event_id]) for event_id, row in found.items()]}, ()
    )
    made.status_code = 200 if all(found.values()) else 202
    return made


@router.get("/changes/{event_id}", response_model=ChangeShown)
async def show_change(request: Request, event_id: ChangePath, query: Queried[ChangeQuery]) -> Response:
    """One change with its verdict; 404 while it is not folded."""
    found = (await _judged(library_of(request), [event_id])).get(event_id, {})
    row = next(iter(found.values()), None) if query.blueprint_id is None else found.get(query.blueprint_id)
    if row is None:
        raise not_found("judged change (yet)", event_id)
    return answer(request, row, [BLUEPRINTS.name])


async def _ask(
    library: Library, events: Mapping[UUID, BlueprintChangeRequested], traceparent: str | None
) -> dict[UUID, Row | None]:
    """Write what was not asked before, and wait; None for what is not folded in time.

    Raises:
        ConflictError: something else was asked under this key.
        UnavailableError: the log or the projection is away; asking again under the same key does no harm.
    """
    judged, trace = await _judged(library, list(events)), incoming_trace(traceparent)
    known = _own(events, judged)
    if judged.keys() - known.keys():  # of another blueprint
        raise _other_request()
    _refuse_others(library, events, known)
    messages = [
        OonaMessage.of(event, id=event_id, source=f"{SOURCE}/api", traceparent=trace)
        for event_id, event in events.items()
        if event_id not in known
    ]
    if messages:
        records = [encode(m) for m in messages]
        (await library.producer.deliver(records, timeout_s=library.urza.settings.change_timeout_s)).positions()
        known = await _await_all(library, events)
        library.versions.expire()
        _refuse_others(library, events, known)
    return {event_id: known.get(event_id) for event_id in events}


def _refuse_others(
    library: Library, events: Mapping[UUID, BlueprintChangeRequested], known: Mapping[UUID, Row]
) -> None:
    """A request is known by its bytes to the process that took it, to every other by what the projection keeps."""
    asked = library.asked
    for event_id, event in events.items():
        digest = hashlib.sha256(event.model_dump_json().encode()).hexdigest()
        row = known.get(event_id)
        is_other = row is not None and any(row[n] != getattr(event, n) for n in _KEPT)
        if is_other or asked.setdefault(str(event_id), digest) != digest:
            raise _other_request()
    while len(asked) > MAX_REMEMBERED:
        del asked[next(iter(asked))]


_KEPT = ("change", "expected_version", "reason")


def _other_request() -> ConflictError:
    return ConflictError("another request was sent under this Idempotency-Key: take a new one")


async def _await_all(library: Library, events: Mapping[UUID, BlueprintChangeRequested]) -> dict[UUID, Row]:
    found: dict[UUID, Row] = {}
    try:
        async with asyncio.timeout(library.urza.settings.change_timeout_s):
            while len(found := _own(events, await _judged(library, list(events)))) < len(events):
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        pass
    return found


async def _judged(library: Library, event_ids: Sequence[UUID]) -> dict[UUID, dict[str, Row]]:
    """Event id -> blueprint -> its row. Two, where two processes took one key for two blueprints at the same time."""
    found: dict[UUID, dict[str, Row]] = {}
    for row in await library.rows.all("changes", event_ids=event_ids):
        found.setdefault(row["event_id"], {})[row["blueprint_id"]] = row
    return found


def _own(events: Mapping[UUID, BlueprintChangeRequested], judged: Mapping[UUID, Mapping[str, Row]]) -> dict[UUID, Row]:
    """The rows of these events' own blueprints."""
    own = {event_id: judged.get(event_id, {}).get(event.blueprint_id) for event_id, event in events.items()}
    return {event_id: row for event_id, row in own.items() if row is not None}


def _pending(event_id: UUID, event: BlueprintChangeRequested) -> Row:
    return {"event_id": event_id, "status": f"/changes/{event_id}?blueprint_id={event.blueprint_id}"}
