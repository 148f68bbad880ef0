"""/decisions, and the causes of a seed's state: Tamiyo's choices and the events that followed from them."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from pydantic import Field

from esper.schemas import ids
from esper.schemas.base import LayerId, SeedId
from esper.schemas.enums import Action
from esper.schemas.topics import COMMANDS, DECISIONS, FIELD_REPORTS, LIFECYCLE, RUNS
from esper.services.urza.api.api_context import api_context
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.pagination import INT4, Listing, Page, PageQuery
from esper.services.urza.api.parameters import NoParameters, QueryOf, RunPath
from esper.services.urza.api.problems import not_found
from esper.services.urza.api.response_cache import json_response
from esper.services.urza.api.routes.runs import existing_run

CAUSE_TOPICS = [RUNS.name, DECISIONS.name, COMMANDS.name, LIFECYCLE.name, FIELD_REPORTS.name]

router = APIRouter(tags=["decisions"])

OF_RUN = Listing("decisions_of", [("after_incarnation", "incarnation", INT4), ("after_boundary", "boundary", INT4)])

DecisionPath = Annotated[
    UUID, Path(description="The decision's event.", examples=[str(ids.decision_id("digits-demo", 1, 1))])
]


class DecisionSummary(ApiModel):
    """Tamiyo's choice for one boundary. It is superseded where a resumed run took over before its step."""

    incarnation: int
    boundary: int
    step: int
    action: Action
    layer_id: str | None
    seed_id: int | None
    blueprint_id: str | None
    probability: float = Field(description="Of this choice, under the policy that made it.")
    policy_id: str
    policy_version: int
    reason: str
    view_digest: str | None = Field(description="SHA-256 of the view that it saw; null where the view was stale.")
    stale: bool
    event_id: UUID
    causation_id: UUID | None
    at: datetime
    is_superseded: bool


class CauseResponse(ApiModel):
    """One event of a seed's history. ``causation_id`` is the event that caused it."""

    at: datetime
    kind: Literal["decision", "command", "lifecycle", "rejection", "breaker", "field report"]
    incarnation: int
    step: int | None
    event_id: UUID
    causation_id: UUID | None
    description: str


class DecisionResponse(DecisionSummary):
    """A decision with all events that follow from it, each with its cause."""

    run_id: str
    consequences: list[CauseResponse]


class SeedHistoryResponse(ApiModel):
    """Every decision, command, transition and report of a seed, in the order of the run's steps."""

    run_id: str
    layer_id: str
    seed_id: int
    causes: list[CauseResponse]


class DecisionQuery(PageQuery):
    """Filters of decisions."""

    action: Action | None = Field(None, description="With this action.")


class SeedSelector(ApiModel):
    """Identifies a seed. A layer's name may hold any character, so it is not part of the path."""

    layer_id: LayerId = Field(description="The layer, by its qualified name.", examples=["fc1"])
    seed_id: Annotated[SeedId, Field(description="The seed's number in its layer.", examples=[0])]


@router.get("/runs/{run_id}/decisions", response_model=Page[DecisionSummary])
async def list_decisions(request: Request, run_id: RunPath, query: QueryOf[DecisionQuery]) -> Response:
    """Tamiyo's choice at each boundary, WAIT included."""
    await existing_run(request, run_id)
    return await OF_RUN.page(request, query, [RUNS.name, DECISIONS.name], run_id=run_id, action=query.action)


@router.get("/runs/{run_id}/causes", response_model=SeedHistoryResponse)
async def show_seed_history(request: Request, run_id: RunPath, query: QueryOf[SeedSelector]) -> Response:
    """Why a seed is in its state: decisions, commands, transitions and reports. Empty where it was always dormant."""
    await existing_run(request, run_id)
    seed = {"run_id": run_id, **query.model_dump()}
    return json_response(request, {**seed, "causes": await _seed_history(request, **seed)}, CAUSE_TOPICS)


@router.get("/decisions/{event_id}", response_model=DecisionResponse)
async def show_decision(request: Request, event_id: DecisionPath, _: NoParameters) -> Response:
    """One decision with its consequences: every event whose causation ids lead back to it."""
    row = await api_context(request).reader.one("decision", event_id=event_id)
    if row is None:
        raise not_found("decision", event_id)
    consequences = []
    if row["layer_id"] is not None:
        seed = {name: row[name] for name in ("run_id", "layer_id", "seed_id")}
        consequences = _consequences(event_id, await _seed_history(request, **seed))
    return json_response(request, {**row, "consequences": consequences}, CAUSE_TOPICS)


async def _seed_history(request: Request, **seed: Any) -> list[dict[str, Any]]:
    return await api_context(request).reader.all("of_seed", sql_file="causes", **seed)


def _consequences(cause: UUID, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that lead back to a cause, in the history's order, in which an event may precede its cause."""
    found, size = {cause}, 0
    while len(found) > size:
        size = len(found)
        found |= {event["event_id"] for event in history if event["causation_id"] in found}
    return [event for event in history if event["event_id"] in found and event["event_id"] != cause]
