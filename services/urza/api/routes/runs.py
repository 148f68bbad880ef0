"""/runs: training runs with their graphs, seeds, epochs, field reports and the views that Tamiyo saw."""

from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import Field

from esper.schemas.assets import TrainingResults
from esper.schemas.base import Scalar
from esper.schemas.enums import LayerKind, RunStatus, SeedStage
from esper.schemas.topics import BLUEPRINTS, FIELD_REPORTS, LIFECYCLE, RUNS, VIEWS, TopicSpec
from esper.services.urza.api.api_context import api_context
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.pagination import INT4, INT8, LATEST, TEXT, Listing, Page, PageQuery
from esper.services.urza.api.parameters import NoParameters, QueryOf, RunPath, UnfilteredQuery
from esper.services.urza.api.problems import not_found
from esper.services.urza.api.response_cache import json_response
from esper.services.urza.api.routes.field_reports import FieldReportResponse

router = APIRouter(prefix="/runs", tags=["runs"])

_SEQUENCE = [("after_incarnation", "incarnation", INT4), ("after_sequence", "sequence", INT8)]
ALL = Listing("runs", [("after_at", "started_at", LATEST), ("after_run", "run_id", TEXT)])
INCARNATIONS = Listing("incarnations_of", [("after_incarnation", "incarnation", INT4)])
LAYERS = Listing("layers_of", [("after_ordinal", "ordinal", INT4), ("after_layer", "layer_id", TEXT)])
EDGES = Listing("edges_of", [("after_source", "source", TEXT), ("after_target", "target", TEXT)])
SEEDS = Listing("seeds_of", [("after_layer", "layer_id", TEXT), ("after_seed", "seed_id", INT4)])
EPOCHS = Listing("epochs_of", _SEQUENCE)
REPORTS = Listing("reports_of", _SEQUENCE)
SEEN_VIEWS = Listing("views_of", [("after_incarnation", "incarnation", INT4), ("after_boundary", "boundary", INT4)])


class RunSummary(ApiModel):
    """The state of a run in its newest incarnation."""

    run_id: str
    model: str
    status: RunStatus
    incarnation: int
    step: int
    epoch: int
    results: TrainingResults | None
    started_at: datetime
    ended_at: datetime | None


class RunResponse(RunSummary):
    """A run with the hyperparameters of its start and the detail of its end."""

    hyperparameters: dict[str, Scalar]
    detail: str


class IncarnationResponse(ApiModel):
    """One process that trained a run: it took over after ``from_step`` of ``from_incarnation``."""

    incarnation: int
    from_incarnation: int | None
    from_step: int
    command_offset: int
    event_id: UUID
    causation_id: UUID | None
    at: datetime


class LayerResponse(ApiModel):
    """A layer that holds seeds."""

    layer_id: str
    ordinal: int
    kind: LayerKind
    num_features: int
    num_parameters: int
    num_seeds: int


class EdgeResponse(ApiModel):
    """The output of ``source`` flows into ``target``."""

    source: str
    target: str


class SeedResponse(ApiModel):
    """A seed that left DORMANT at least once, in the newest incarnation of its run."""

    layer_id: str
    seed_id: int
    stage: SeedStage
    since_step: int
    blueprint_id: str | None
    kernel_sha256: str | None
    num_parameters: int


class EpochResponse(ApiModel):
    """An epoch with its metrics. It is superseded where a resumed run took over before its step."""

    incarnation: int
    sequence: int
    epoch: int
    step: int
    metrics: dict[str, float | None]
    event_id: UUID
    at: datetime
    is_superseded: bool


class ViewResponse(ApiModel):
    """A view that a decision saw: the SHA-256 of its bytes, and their position in `control.tamiyo.views`."""

    incarnation: int
    boundary: int
    view_version: int
    digest: str
    num_bytes: int
    log_partition: int
    log_offset: int
    event_id: UUID
    at: datetime


class RunQuery(PageQuery):
    """Filters of runs."""

    status: list[RunStatus] = Field(default_factory=list, description="In one of these states.")


class SeedsQuery(PageQuery):
    """Filters of seeds."""

    stage: SeedStage | None = Field(None, description="In this stage.")


@router.get("", response_model=Page[RunSummary])
async def list_runs(request: Request, query: QueryOf[RunQuery]) -> Response:
    """Runs, the newest first."""
    return await ALL.page(request, query, [RUNS.name], statuses=query.status or list(RunStatus))


@router.get("/{run_id}", response_model=RunResponse)
async def show_run(request: Request, run_id: RunPath, _: NoParameters) -> Response:
    """One run."""
    return json_response(request, await existing_run(request, run_id), [RUNS.name])


@router.get("/{run_id}/incarnations", response_model=Page[IncarnationResponse])
async def list_incarnations(request: Request, run_id: RunPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """The processes that trained it, in their order."""
    return await _page_of(INCARNATIONS, request, run_id, query)


@router.get("/{run_id}/layers", response_model=Page[LayerResponse])
async def list_layers(request: Request, run_id: RunPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """Its layers, in the model's order."""
    return await _page_of(LAYERS, request, run_id, query)


@router.get("/{run_id}/edges", response_model=Page[EdgeResponse])
async def list_edges(request: Request, run_id: RunPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """The data flow between its layers."""
    return await _page_of(EDGES, request, run_id, query)


@router.get("/{run_id}/seeds", response_model=Page[SeedResponse])
async def list_seeds(request: Request, run_id: RunPath, query: QueryOf[SeedsQuery]) -> Response:
    """Its seeds that left DORMANT at least once, by layer."""
    return await _page_of(SEEDS, request, run_id, query, LIFECYCLE, BLUEPRINTS, stage=query.stage)


@router.get("/{run_id}/epochs", response_model=Page[EpochResponse])
async def list_epochs(request: Request, run_id: RunPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """Its epochs with their metrics."""
    return await _page_of(EPOCHS, request, run_id, query)


@router.get("/{run_id}/reports", response_model=Page[FieldReportResponse])
async def list_run_reports(request: Request, run_id: RunPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """The outcomes of its adaptations."""
    return await _page_of(REPORTS, request, run_id, query, FIELD_REPORTS)


@router.get("/{run_id}/views", response_model=Page[ViewResponse])
async def list_views(request: Request, run_id: RunPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """The digests of the views that Tamiyo saw, by boundary."""
    return await _page_of(SEEN_VIEWS, request, run_id, query, VIEWS)


async def existing_run(request: Request, run_id: str) -> dict[str, Any]:
    """The run's row, or a 404."""
    row = await api_context(request).reader.one("run", run_id=run_id)
    if row is None:
        raise not_found("run", run_id)
    return row


async def _page_of(
    listing: Listing, request: Request, run_id: str, query: PageQuery, *topics: TopicSpec, **filters: Any
) -> Response:
    """A page of an existing run's list, which is read from these topics and system.runs."""
    await existing_run(request, run_id)
    names = [RUNS.name, *(topic.name for topic in topics)]
    return await listing.page(request, query, names, run_id=run_id, **filters)
