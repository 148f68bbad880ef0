"""/blueprints: what can grow, its changes and certificates, and its outcomes in runs."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import Field

from esper.schemas.assets import BlueprintSpec, Measurement
from esper.schemas.base import RunId
from esper.schemas.enums import BlueprintStatus, LayerKind, RunStatus, SeedStage
from esper.schemas.topics import BLUEPRINTS, FIELD_REPORTS, LIFECYCLE, RUNS, TopicSpec
from esper.services.urza.api.api_context import api_context
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.pagination import INT4, INT8, TEXT, Listing, Page, PageQuery
from esper.services.urza.api.parameters import BlueprintPath, NoParameters, QueryOf, UnfilteredQuery
from esper.services.urza.api.problems import not_found
from esper.services.urza.api.response_cache import json_response
from esper.services.urza.api.routes.changes import ChangeResponse
from esper.services.urza.api.routes.field_reports import FieldReportResponse

UNVALIDATED = (BlueprintStatus.PROPOSED, BlueprintStatus.COMPILED)

router = APIRouter(prefix="/blueprints", tags=["blueprints"])

ALL = Listing("blueprints", [("after_id", "blueprint_id", TEXT)])
CHANGES = Listing("changes_of", [("after_offset", "log_offset", INT8)])
ACTIVE_SEEDS = Listing(
    "seeds_of_blueprint",
    [("after_run", "run_id", TEXT), ("after_layer", "layer_id", TEXT), ("after_seed", "seed_id", INT4)],
)
USING_RUNS = Listing("runs_of_blueprint", [("after_run", "run_id", TEXT)])
CERTIFICATES = Listing("certificates", [("after_version", "blueprint_version", INT4)], sql_file="library")
REFUSALS = Listing(
    "refusals",
    [
        ("after_target", "target", TEXT),
        ("after_features", "num_features", INT4),
        ("after_version", "blueprint_version", INT4),
    ],
    sql_file="library",
)
REPORTS = Listing(
    "reports_of_blueprint",
    [
        ("after_run", "run_id", TEXT),
        ("after_incarnation", "incarnation", INT4),
        ("after_sequence", "sequence", INT8),
    ],
)


class BlueprintResponse(ApiModel):
    """A blueprint. ``version`` counts its accepted changes."""

    blueprint_id: str
    version: int
    status: BlueprintStatus
    spec: BlueprintSpec
    changed_at: datetime


class CertificateResponse(ApiModel):
    """Checks and measurements of a blueprint version that passed its examination; the cause of its certification."""

    blueprint_version: int
    examiner: str = Field(description="Library, version and device of the examination.")
    checks: list[str] = Field(description="The checks that it passed, in their order.")
    measurements: list[Measurement]
    event_id: UUID
    at: datetime


class KernelRefusalResponse(ApiModel):
    """A kernel that cannot be built: the blueprint is not offered to layers of this kind and width."""

    blueprint_version: int
    target: LayerKind
    num_features: int
    reason: str
    event_id: UUID
    at: datetime


class ActiveSeedResponse(ApiModel):
    """A seed that uses a blueprint in the newest incarnation of its run."""

    run_id: str
    layer_id: str
    seed_id: int
    incarnation: int
    stage: SeedStage
    since_step: int
    kernel_sha256: str | None


class UsingRunResponse(ApiModel):
    """A run in which a blueprint germinated. ``num_given_up`` counts cancelled and culled seeds."""

    run_id: RunId
    model: str | None
    status: RunStatus | None
    num_germinations: int
    num_fossilized: int
    num_given_up: int
    first_at: datetime
    last_at: datetime


class OutcomeResponse(ApiModel):
    """Field reports of one outcome, method and metric. A gain is the metric after minus the metric before."""

    outcome: SeedStage
    method: str
    metric: str
    num_reports: int
    num_runs: int
    num_measured: int = Field(description="Reports with a value before and after, which the gains are computed from.")
    mean_gain: float | None
    least_gain: float | None
    greatest_gain: float | None
    deviation_of_gain: float | None = Field(description="Sample standard deviation; null for fewer than two.")
    mean_parameters: float | None
    last_at: datetime


class OutcomesResponse(ApiModel):
    """The outcomes of a blueprint in all runs, without superseded reports."""

    items: list[OutcomeResponse]


class BlueprintQuery(PageQuery):
    """Filters of blueprints."""

    status: list[BlueprintStatus] = Field(default_factory=list, description="In one of these states.")
    validated: bool | None = Field(
        None, description="`false`: only those not yet certified or rejected; `true`: only the others."
    )
    module: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")] | None = Field(
        None, description="Of this module of the catalogue."
    )
    target: LayerKind | None = Field(None, description="For layers of this kind.")

    @property
    def statuses(self) -> list[BlueprintStatus]:
        """The states that match; without a filter all."""
        statuses = self.status or list(BlueprintStatus)
        if self.validated is None:
            return statuses
        return [s for s in statuses if (s in UNVALIDATED) is not self.validated]


@router.get("", response_model=Page[BlueprintResponse])
async def list_blueprints(request: Request, query: QueryOf[BlueprintQuery]) -> Response:
    """Blueprints, by id."""
    filters = {"statuses": query.statuses, "module": query.module, "target": query.target}
    return await ALL.page(request, query, [BLUEPRINTS.name], **filters)


@router.get("/{blueprint_id}", response_model=BlueprintResponse)
async def show_blueprint(request: Request, blueprint_id: BlueprintPath, _: NoParameters) -> Response:
    """One blueprint."""
    return json_response(request, await _existing_blueprint(request, blueprint_id), [BLUEPRINTS.name])


@router.get("/{blueprint_id}/changes", response_model=Page[ChangeResponse])
async def list_changes(request: Request, blueprint_id: BlueprintPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """Every change that was requested of it, in the order of the log, with its verdict.

    A blueprint whose proposals were all refused has changes and does not exist otherwise.
    """
    if not await api_context(request).reader.all("changes_of", blueprint_id=blueprint_id, after_offset=-1, limit=1):
        raise not_found("blueprint", blueprint_id)
    return await CHANGES.page(request, query, [BLUEPRINTS.name], blueprint_id=blueprint_id)


@router.get("/{blueprint_id}/certificates", response_model=Page[CertificateResponse])
async def list_certificates(request: Request, blueprint_id: BlueprintPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """Its certificates, by version. A version that a person certified without an examination has none."""
    return await _page_of(CERTIFICATES, request, blueprint_id, query)


@router.get("/{blueprint_id}/refusals", response_model=Page[KernelRefusalResponse])
async def list_refusals(request: Request, blueprint_id: BlueprintPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """Its kernels that cannot be built, by kind of layer and width, with the reasons."""
    return await _page_of(REFUSALS, request, blueprint_id, query)


@router.get("/{blueprint_id}/seeds", response_model=Page[ActiveSeedResponse])
async def list_active_seeds(request: Request, blueprint_id: BlueprintPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """The seeds that use it now, in all runs."""
    return await _page_of(ACTIVE_SEEDS, request, blueprint_id, query, LIFECYCLE, RUNS)


@router.get("/{blueprint_id}/runs", response_model=Page[UsingRunResponse])
async def list_using_runs(request: Request, blueprint_id: BlueprintPath, query: QueryOf[UnfilteredQuery]) -> Response:
    """The runs in which it germinated."""
    return await _page_of(USING_RUNS, request, blueprint_id, query, LIFECYCLE, RUNS, FIELD_REPORTS)


@router.get("/{blueprint_id}/outcomes", response_model=OutcomesResponse)
async def show_outcomes(request: Request, blueprint_id: BlueprintPath, _: NoParameters) -> Response:
    """Its field reports, aggregated by outcome, method and metric, without superseded ones."""
    await _existing_blueprint(request, blueprint_id)
    items = await api_context(request).reader.all("outcomes_of_blueprint", blueprint_id=blueprint_id)
    return json_response(request, {"items": items}, [BLUEPRINTS.name, FIELD_REPORTS.name, RUNS.name])


@router.get("/{blueprint_id}/reports", response_model=Page[FieldReportResponse])
async def list_blueprint_reports(
    request: Request, blueprint_id: BlueprintPath, query: QueryOf[UnfilteredQuery]
) -> Response:
    """Its field reports, by run."""
    return await _page_of(REPORTS, request, blueprint_id, query, FIELD_REPORTS, RUNS)


async def _page_of(
    listing: Listing, request: Request, blueprint_id: str, query: PageQuery, *topics: TopicSpec
) -> Response:
    """A page of an existing blueprint's list, which is read from these topics and innovation.blueprints."""
    await _existing_blueprint(request, blueprint_id)
    names = [BLUEPRINTS.name, *(topic.name for topic in topics)]
    return await listing.page(request, query, names, blueprint_id=blueprint_id)


async def _existing_blueprint(request: Request, blueprint_id: str) -> dict[str, Any]:
    """The blueprint's row, or a 404."""
    row = await api_context(request).reader.one("blueprint", sql_file="library", blueprint_id=blueprint_id)
    if row is None:
        raise not_found("blueprint", blueprint_id)
    return row
