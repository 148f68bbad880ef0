"""/runs: trainings, their graphs and seeds, their course and what Tamiyo saw of it."""

from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import Field

from esper.schemas.assets import TrainingResults
from esper.schemas.base import Scalar
from esper.schemas.enums import LayerKind, RunStatus, SeedStage
from esper.schemas.topics import BLUEPRINTS, FIELD_REPORTS, LIFECYCLE, RUNS, VIEWS
from esper.services.urza.api.api_context import library_of
from esper.services.urza.api.pagination import INT4, INT8, LATEST, TEXT, Listing, Page, PageQuery, RowModel
from esper.services.urza.api.parameters import Plain, PlainQuery, Queried, RunPath
from esper.services.urza.api.problems import not_found
from esper.services.urza.api.response_cache import answer
from esper.services.urza.api.routes.field_reports import FieldReport

router = APIRouter(prefix="/runs", tags=["runs"])

_SEQUENCE = [("after_incarnation", "incarnation", INT4), ("after_sequence", "sequence", INT8)]
ALL = Listing("runs", [("after_at", "started_at", LATEST), ("after_run", "run_id", TEXT)])
INCARNATIONS = Listing("incarnations_of", [("after_incarnation", "incarnation", INT4)])
LAYERS = Listing("layers_of", [("after_ordinal", "ordinal", INT4), ("after_layer", "layer_id", TEXT)])
EDGES = Listing("edges_of", [("after_source", "source", TEXT), ("after_target", "target", TEXT)])
SEEDS = Listing("seeds_of", [("after_layer", "layer_id", TEXT), ("after_seed", "seed_id", INT4)])
EPOCHS = Listing("epochs_of", _SEQUENCE)
REPORTS = Listing("reports_of", _SEQUENCE)
VIEWED = Listing("views_of", [("after_incarnation", "incarnation", INT4), ("after_boundary", "boundary", INT4)])


class RunInList(RowModel):
    """A run as its newest incarnation stands."""

    run_id: str
    model: str
    status: RunStatus
    incarnation: int
    step: int
    epoch: int
    results: TrainingResults | None
    started_at: datetime
    ended_at: datetime | None


class RunShown(RunInList):
    """The same, with what it was started with and how it ended."""

    hyperparameters: dict[str, Scalar]
    detail: str


class IncarnationShown(RowModel):
    """One process's go at a run: it took over after ``from_step`` of ``from_incarnation``."""

    incarnation: int
    from_incarnation: int | None
    from_step: int
    command_offset: int
    event_id: UUID
    causation_id: UUID | None
    at: datetime


class LayerShown(RowModel):
    """A layer that holds seeds."""

    layer_id: str
    ordinal: int
    kind: LayerKind
    num_features: int
    num_parameters: int
    num_seeds: int


class EdgeShown(RowModel):
    """The output of ``source`` flows into ``target``."""

    source: str
    target: str


class SeedShown(RowModel):
    """A seed that moved, as it stands on the live line."""

    layer_id: str
    seed_id: int
    stage: SeedStage
    since_step: int
    blueprint_id: str | None
    kernel_sha256: str | None
    num_parameters: int


class EpochShown(RowModel):
    """An epoch with its metrics. Superseded: a resumed run took over before it."""

    incarnation: int
    sequence: int
    epoch: int
    step: int
    metrics: dict[str, float | None]
    event_id: UUID
    at: datetime
    is_superseded: bool


class ViewShown(RowModel):
    """Which bytes a decision saw: their SHA-256, and where the log has them (`control.tamiyo.views`)."""

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
    """Which runs."""

    status: list[RunStatus] = Field(default_factory=list, description="Those in one of these states.")


class SeedQuery(PageQuery):
    """Which seeds."""

    stage: SeedStage | None = Field(None, description="Those that stand here.")


@router.get("", response_model=Page[RunInList])
async def list_runs(request: Request, query: Queried[RunQuery]) -> Response:
    """Runs, the newest first."""
    return await ALL.page(request, query, [RUNS.name], statuses=query.status or list(RunStatus))


@router.get("/{run_id}", response_model=RunShown)
async def show_run(request: Request, run_id: RunPath, _: PlainQuery) -> Response:
    """One run."""
    return answer(request, await existing_run(request, run_id), [RUNS.name])


@router.get("/{run_id}/incarnations", response_model=Page[IncarnationShown])
async def list_incarnations(request: Request, run_id: RunPath, query: Queried[Plain]) -> Response:
    """The processes that trained it, one after the other."""
    await existing_run(request, run_id)
    return await INCARNATIONS.page(request, query, [RUNS.name], run_id=run_id)


@router.get("/{run_id}/layers", response_model=Page[LayerShown])
async def list_layers(request: Request, run_id: RunPath, query: Queried[Plain]) -> Response:
    """Its layers, in the model's order."""
    await existing_run(request, run_id)
    return await LAYERS.page(request, query, [RUNS.name], run_id=run_id)


@router.get("/{run_id}/edges", response_model=Page[EdgeShown])
async def list_edges(request: Request, run_id: RunPath, query: Queried[Plain]) -> Response:
    """The data flow between its layers."""
    await existing_run(request, run_id)
    return await EDGES.page(request, query, [RUNS.name], run_id=run_id)


@router.get("/{run_id}/seeds", response_model=Page[SeedShown])
async def list_seeds(request: Request, run_id: RunPath, query: Queried[SeedQuery]) -> Response:
    """Its seeds that ever moved, by layer; every other seed is dormant."""
    await existing_run(request, run_id)
    topics = [RUNS.name, LIFECYCLE.name, BLUEPRINTS.name]
    return await SEEDS.page(request, query, topics, run_id=run_id, stage=query.stage)


@router.get("/{run_id}/epochs", response_model=Page[EpochShown])
async def list_epochs(request: Request, run_id: RunPath, query: Queried[Plain]) -> Response:
    """Its epochs with their metrics."""
    await existing_run(request, run_id)
    return await EPOCHS.page(request, query, [RUNS.name], run_id=run_id)


@router.get("/{run_id}/reports", response_model=Page[FieldReport])
async def list_reports(request: Request, run_id: RunPath, query: Queried[Plain]) -> Response:
    """How its adaptations turned out."""
    await existing_run(request, run_id)
    return await REPORTS.page(request, query, [RUNS.name, FIELD_REPORTS.name], run_id=run_id)


@router.get("/{run_id}/views", response_model=Page[ViewShown])
async def list_views(request: Request, run_id: RunPath, query: Queried[Plain]) -> Response:
    """The digests of what Tamiyo saw at each boundary."""
    await existing_run(request, run_id)
    return await VIEWED.page(request, query, [RUNS.name, VIEWS.name], run_id=run_id)


async def existing_run(request: Request, run_id: str) -> dict[str, Any]:
    """The run's row; a 404 without one."""
    row = await library_of(request).rows.one("run", run_id=run_id)
    if row is None:
        raise not_found("run", run_id)
    return row
