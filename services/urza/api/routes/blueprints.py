"""/blueprints: what can grow, how it came to be, and how it turned out wherever it grew."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from pydantic import Field

from esper.schemas.assets import BlueprintSpec, Measurement
from esper.schemas.base import BlueprintId, RunId
from esper.schemas.enums import BlueprintStatus, LayerKind, RunStatus, SeedStage
from esper.schemas.topics import BLUEPRINTS, FIELD_REPORTS, LIFECYCLE, RUNS
from esper.services.urza.api.api_context import library_of
from esper.services.urza.api.pagination import INT4, INT8, TEXT, Listing, Page, PageQuery, RowModel
from esper.services.urza.api.parameters import Plain, PlainQuery, Queried
from esper.services.urza.api.problems import not_found
from esper.services.urza.api.response_cache import answer
from esper.services.urza.api.routes.changes import ChangeShown
from esper.services.urza.api.routes.field_reports import FieldReport

UNVALIDATED = (BlueprintStatus.PROPOSED, BlueprintStatus.COMPILED)

router = APIRouter(prefix="/blueprints", tags=["blueprints"])

BlueprintPath = Annotated[BlueprintId, Path(description="The blueprint's id.", examples=["low-rank-4"])]

ALL = Listing("blueprints", [("after_id", "blueprint_id", TEXT)])
CHANGES = Listing("changes_of", [("after_offset", "log_offset", INT8)])
LIVING = Listing(
    "seeds_of_blueprint",
    [("after_run", "run_id", TEXT), ("after_layer", "layer_id", TEXT), ("after_seed", "seed_id", INT4)],
)
USERS = Listing("runs_of_blueprint", [("after_run", "run_id", TEXT)])
CERTIFICATES = Listing("certificates", [("after_version", "blueprint_version", INT4)], room="library")
REFUSALS = Listing(
    "refusals",
    [
        ("after_target", "target", TEXT),
        ("after_features", "num_features", INT4),
        ("after_version", "blueprint_version", INT4),
    ],
    room="library",
)
REPORTS = Listing(
    "reports_of_blueprint",
    [
        ("after_run", "run_id", TEXT),
        ("after_incarnation", "incarnation", INT4),
        ("after_sequence", "sequence", INT8),
    ],
)


class BlueprintShown(RowModel):
    """A blueprint as the log has it. ``version`` counts its accepted changes."""

    blueprint_id: str
    version: int
    status: BlueprintStatus
    spec: BlueprintSpec
    changed_at: datetime


class CertificateShown(RowModel):
    """What a version of a blueprint measured when it passed its examination: the cause of its certification."""

    blueprint_version: int
    examiner: str = Field(description="What measured: library, version, device.")
    checks: list[str] = Field(description="Those that it passed, in the order in which they were made.")
    measurements: list[Measurement]
    event_id: UUID
    at: datetime


class RefusalShown(RowModel):
    """A kernel that cannot be built: runs with layers of this kind and width are not offered the blueprint."""

    blueprint_version: int
    target: LayerKind
    num_features: int
    reason: str
    event_id: UUID
    at: datetime


class LivingSeed(RowModel):
    """A seed that lives with a blueprint now, on its run's live line."""

    run_id: str
    layer_id: str
    seed_id: int
    incarnation: int
    stage: SeedStage
    since_step: int
    kernel_sha256: str | None


class RunUsing(RowModel):
    """A run in which a blueprint germinated. ``num_given_up`` seeds were cancelled or culled."""

    run_id: RunId
    model: str | None
    status: RunStatus | None
    num_germinations: int
    num_fossilized: int
    num_given_up: int
    first_at: datetime
    last_at: datetime


class Outcome(RowModel):
    """Field reports that say the same kind of thing. A gain is the metric after less before."""

    outcome: SeedStage
    method: str
    metric: str
    num_reports: int
    num_runs: int
    num_measured: int = Field(description="Reports with a value before and after: those that gains are about.")
    mean_gain: float | None
    least_gain: float | None
    greatest_gain: float | None
    deviation_of_gain: float | None = Field(description="Sample standard deviation; null for fewer than two.")
    mean_parameters: float | None
    last_at: datetime


class Outcomes(RowModel):
    """How a blueprint turned out, on the live lines of all runs."""

    items: list[Outcome]


class BlueprintQuery(PageQuery):
    """Which blueprints."""

    status: list[BlueprintStatus] = Field(default_factory=list, description="Those in one of these states.")
    validated: bool | None = Field(None, description="`false`: those not yet certified or rejected, and no others.")
    module: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")] | None = Field(
        None, description="Those that build this module of the catalogue."
    )
    target: LayerKind | None = Field(None, description="Those for layers of this kind.")

    @property
    def statuses(self) -> list[BlueprintStatus]:
        """The states that were asked for, all of them without a filter."""
        wanted = self.status or list(BlueprintStatus)
        if self.validated is None:
            return wanted
        return [s for s in wanted if (s in UNVALIDATED) is not self.validated]


@router.get("", response_model=Page[BlueprintShown])
async def list_blueprints(request: Request, query: Queried[BlueprintQuery]) -> Response:
    """Blueprints, by id."""
    filters = {"statuses": query.statuses, "module": query.module, "target": query.target}
    return await ALL.page(request, query, [BLUEPRINTS.name], **filters)


@router.get("/{blueprint_id}", response_model=BlueprintShown)
async def show_blueprint(request: Request, blueprint_id: BlueprintPath, _: PlainQuery) -> Response:
    """One blueprint."""
    return answer(request, await _blueprint(request, blueprint_id), [BLUEPRINTS.name])


@router.get("/{blueprint_id}/changes", response_model=Page[ChangeShown])
async def list_changes(request: Request, blueprint_id: BlueprintPath, query: Queried[Plain]) -> Response:
    """Every change that was asked of it, in the order of the log, with its verdict."""
    await _blueprint_or_change(request, blueprint_id)
    return await CHANGES.page(request, query, [BLUEPRINTS.name], blueprint_id=blueprint_id)


@router.get("/{blueprint_id}/certificates", response_model=Page[CertificateShown])
async def list_certificates(request: Request, blueprint_id: BlueprintPath, query: Queried[Plain]) -> Response:
    """What it measured when it was examined, by version. None where somebody certified it by their own word."""
    await _blueprint(request, blueprint_id)
    return await CERTIFICATES.page(request, query, [BLUEPRINTS.name], blueprint_id=blueprint_id)


@router.get("/{blueprint_id}/refusals", response_model=Page[RefusalShown])
async def list_refusals(request: Request, blueprint_id: BlueprintPath, query: Queried[Plain]) -> Response:
    """Its kernels that cannot be built, by kind of layer and width, with the reasons."""
    await _blueprint(request, blueprint_id)
    return await REFUSALS.page(request, query, [BLUEPRINTS.name], blueprint_id=blueprint_id)


@router.get("/{blueprint_id}/seeds", response_model=Page[LivingSeed])
async def list_living_seeds(request: Request, blueprint_id: BlueprintPath, query: Queried[Plain]) -> Response:
    """The seeds that live with it now, in all runs."""
    await _blueprint(request, blueprint_id)
    topics = [BLUEPRINTS.name, LIFECYCLE.name, RUNS.name]
    return await LIVING.page(request, query, topics, blueprint_id=blueprint_id)


@router.get("/{blueprint_id}/runs", response_model=Page[RunUsing])
async def list_runs_using(request: Request, blueprint_id: BlueprintPath, query: Queried[Plain]) -> Response:
    """The runs in which it ever germinated."""
    await _blueprint(request, blueprint_id)
    topics = [BLUEPRINTS.name, LIFECYCLE.name, RUNS.name, FIELD_REPORTS.name]
    return await USERS.page(request, query, topics, blueprint_id=blueprint_id)


@router.get("/{blueprint_id}/outcomes", response_model=Outcomes)
async def show_outcomes(request: Request, blueprint_id: BlueprintPath, _: PlainQuery) -> Response:
    """Its field reports, aggregated by outcome, method and metric. What was superseded does not count."""
    await _blueprint(request, blueprint_id)
    items = await library_of(request).rows.all("outcomes_of_blueprint", blueprint_id=blueprint_id)
    return answer(request, {"items": items}, [BLUEPRINTS.name, FIELD_REPORTS.name, RUNS.name])


@router.get("/{blueprint_id}/reports", response_model=Page[FieldReport])
async def list_reports_about(request: Request, blueprint_id: BlueprintPath, query: Queried[Plain]) -> Response:
    """Its field reports, by run."""
    await _blueprint(request, blueprint_id)
    topics = [BLUEPRINTS.name, FIELD_REPORTS.name, RUNS.name]
    return await REPORTS.page(request, query, topics, blueprint_id=blueprint_id)


async def _blueprint(request: Request, blueprint_id: str) -> dict[str, Any]:
    row = await library_of(request).rows.one("blueprint", room="library", blueprint_id=blueprint_id)
    if row is None:
        raise not_found("blueprint", blueprint_id)
    return row


async def _blueprint_or_change(request: Request, blueprint_id: str) -> None:
    """A change that was refused is history too, where its blueprint never came to be."""
    rows = library_of(request).rows
    if not await rows.all("changes_of", blueprint_id=blueprint_id, after_offset=-1, limit=1):
        raise not_found("blueprint", blueprint_id)
