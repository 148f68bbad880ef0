"""Decisions and causes: what Tamiyo chose, what followed, and why a seed is what it is."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from esper.schemas import ids
from esper.schemas.base import LayerId, SeedId
from esper.schemas.enums import Action
from esper.schemas.topics import COMMANDS, DECISIONS, FIELD_REPORTS, LIFECYCLE, RUNS
from esper.services.urza.api.api_context import library_of
from esper.services.urza.api.pagination import INT4, Listing, Page, PageQuery, RowModel
from esper.services.urza.api.parameters import PlainQuery, Queried, RunPath
from esper.services.urza.api.problems import not_found
from esper.services.urza.api.response_cache import answer
from esper.services.urza.api.routes.runs import existing_run

CHAIN = [RUNS.name, DECISIONS.name, COMMANDS.name, LIFECYCLE.name, FIELD_REPORTS.name]

router = APIRouter(tags=["decisions"])

OF_RUN = Listing("decisions_of", [("after_incarnation", "incarnation", INT4), ("after_boundary", "boundary", INT4)])

DecisionPath = Annotated[
    UUID, Path(description="The decision's event.", examples=[str(ids.decision_id("digits-demo", 1, 1))])
]


class DecisionInList(RowModel):
    """Tamiyo's one choice for a boundary. Superseded: a resumed run took over before it."""

    incarnation: int
    boundary: int
    step: int
    action: Action
    layer_id: str | None
    seed_id: int | None
    blueprint_id: str | None
    probability: float = Field(description="Of this choice, under the policy that acted.")
    policy_id: str
    policy_version: int
    reason: str
    view_digest: str | None = Field(description="SHA-256 of exactly what it saw; null where it was stale.")
    stale: bool
    event_id: UUID
    causation_id: UUID | None
    at: datetime
    is_superseded: bool


class CauseShown(RowModel):
    """One link of a seed's story. ``causation_id`` is the event that caused it: follow it back to ask why."""

    at: datetime
    kind: Literal["decision", "command", "lifecycle", "rejection", "breaker", "field report"]
    incarnation: int
    step: int | None
    event_id: UUID
    causation_id: UUID | None
    told: str


class DecisionShown(DecisionInList):
    """A decision with all that came of it, each link with the event that caused it."""

    run_id: str
    consequences: list[CauseShown]


class Story(RowModel):
    """All that was decided, asked, done and reported about a seed, in the order of the run's steps."""

    run_id: str
    layer_id: str
    seed_id: int
    causes: list[CauseShown]


class DecisionQuery(PageQuery):
    """Which decisions."""

    action: Action | None = Field(None, description="Those that chose this.")


class SeedNamed(BaseModel):
    """Which seed: a layer's name may hold any character, so it is no part of the path."""

    model_config = ConfigDict(extra="forbid")

    layer_id: LayerId = Field(description="The layer, by its qualified name.", examples=["fc1"])
    seed_id: Annotated[SeedId, Field(description="The seed's number in its layer.", examples=[0])]


@router.get("/runs/{run_id}/decisions", response_model=Page[DecisionInList])
async def list_decisions(request: Request, run_id: RunPath, query: Queried[DecisionQuery]) -> Response:
    """What Tamiyo chose at each boundary, WAIT too."""
    await existing_run(request, run_id)
    return await OF_RUN.page(request, query, [RUNS.name, DECISIONS.name], run_id=run_id, action=query.action)


@router.get("/runs/{run_id}/causes", response_model=Story)
async def why_does_it_live(request: Request, run_id: RunPath, query: Queried[SeedNamed]) -> Response:
    """Why did this seed live? Decision, command, lifecycle and field report, by cause; empty where it always slept."""
    await existing_run(request, run_id)
    named = {"run_id": run_id, **query.model_dump()}
    return answer(request, {**named, "causes": await _story(request, **named)}, CHAIN)


@router.get("/decisions/{event_id}", response_model=DecisionShown)
async def show_decision(request: Request, event_id: DecisionPath, _: PlainQuery) -> Response:
    """One decision, and what came of it: everything that goes back to it by causation ids."""
    row = await library_of(request).rows.one("decision", event_id=event_id)
    if row is None:
        raise not_found("decision", event_id)
    story = []
    if row["layer_id"] is not None:
        seed = {name: row[name] for name in ("run_id", "layer_id", "seed_id")}
        story = _following(event_id, await _story(request, **seed))
    return answer(request, {**row, "consequences": story}, CHAIN)


async def _story(request: Request, **seed: Any) -> list[dict[str, Any]]:
    return await library_of(request).rows.all("of_seed", room="causes", **seed)


def _following(cause: UUID, story: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The links that go back to an event, in the story's order; a link may stand before its cause there."""
    found, size = {cause}, 0
    while len(found) > size:
        size = len(found)
        found |= {link["event_id"] for link in story if link["causation_id"] in found}
    return [link for link in story if link["event_id"] in found and link["event_id"] != cause]
