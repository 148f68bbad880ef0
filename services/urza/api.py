"""Urza's API: blueprints, kernels, runs. Reads the projections; changes go through the log.

Errors are problem+json (RFC 9457). A change is written to the log, then waited for: 200 with
its verdict, or 202 with where to look when the projection takes longer.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import UUID

from fastapi import FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from esper.errors import ContractError, EsperError, NotAllowedError, UnavailableError
from esper.kasmina.catalogue import MAX_KERNEL_BYTES
from esper.oona.cloudevents import explain
from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.base import Fact, Sha256
from esper.schemas.enums import BlueprintChange
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.messages import OonaMessage
from esper.services.urza.catalogue import SOURCE
from esper.services.urza.service import Urza
from esper.streams.queries import queries

POLL_S = 0.02
GZIP_FROM_BYTES = 1000
JSON_COLUMNS = ("spec", "results", "hyperparameters")

Limit = Annotated[int, Query(ge=1, le=500)]
Offset = Annotated[int, Query(ge=0, le=1_000_000)]


class ChangeBody(Fact):
    """What is asked of a blueprint; ``expected_version`` is the version that the caller saw."""

    change: BlueprintChange
    expected_version: int
    spec: BlueprintSpec | None = None
    reason: str = ""


def make_api(urza: Urza) -> FastAPI:
    """The API of an Urza that is open, and that its opener closes once the API has ended."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Urza]]:
        yield {"urza": urza}

    api = FastAPI(title="Urza", version="1", lifespan=lifespan)
    api.add_middleware(GZipMiddleware, minimum_size=GZIP_FROM_BYTES)
    _add_problems(api)
    _add_health(api)
    _add_blueprints(api)
    _add_kernels(api)
    _add_runs(api)
    return api


def _add_problems(api: FastAPI) -> None:
    @api.exception_handler(StarletteHTTPException)
    async def http(_request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _problem(error.status_code, str(error.detail))

    @api.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        told = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        return _problem(422, told)

    @api.exception_handler(UnavailableError)
    @api.exception_handler(NotAllowedError)  # it is Urza that a service refuses, not who asked Urza
    async def unavailable(_request: Request, error: EsperError) -> JSONResponse:
        return _problem(503, str(error))


def _add_health(api: FastAPI) -> None:
    @api.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @api.get("/health/ready")
    async def ready(request: Request) -> dict[str, str]:
        if not _urza(request).is_ready:
            raise HTTPException(503, "Kafka, Postgres or S3 is away, or the catalogue is not complete yet")
        return {"status": "ready"}


def _add_blueprints(api: FastAPI) -> None:
    sql = queries("urza")

    @api.get("/blueprints")
    async def blueprints(request: Request, limit: Limit = 100, offset: Offset = 0) -> list[dict[str, Any]]:
        found = sql.blueprints(_urza(request).pool, limit=limit, offset=offset)
        return [_shown(r) async for r in found]

    @api.get("/blueprints/{blueprint_id}")
    async def blueprint(request: Request, blueprint_id: str) -> dict[str, Any]:
        pool = _urza(request).pool
        row = await sql.blueprint(pool, blueprint_id=blueprint_id)
        if row is None:
            raise HTTPException(404, f"there is no blueprint {blueprint_id!r}")
        changes = [_shown(r) async for r in sql.changes_of(pool, blueprint_id=blueprint_id)]
        return {**_shown(row), "changes": changes}

    @api.post("/blueprints/{blueprint_id}/changes")
    async def change(
        request: Request,
        response: Response,
        blueprint_id: str,
        body: ChangeBody,
        idempotency_key: Annotated[str, Header(min_length=8, max_length=200)],
    ) -> dict[str, Any]:
        try:
            event = BlueprintChangeRequested(blueprint_id=blueprint_id, **body.model_dump())
        except ValidationError as error:
            raise HTTPException(422, explain(error)) from error
        urza, event_id = _urza(request), ids.request_id(idempotency_key)
        await urza.producer.send(OonaMessage.of(event, id=event_id, source=f"{SOURCE}/api"))
        row = await _await_change(urza, event_id)
        if row is None:
            response.status_code = 202
            return {"event_id": str(event_id), "status": f"/changes/{event_id}"}
        return _shown(row)

    @api.get("/changes/{event_id}")
    async def change_status(request: Request, event_id: UUID) -> dict[str, Any]:
        row = await sql.change(_urza(request).pool, event_id=event_id)
        if row is None:
            raise HTTPException(404, f"no change {event_id} has been judged (yet)")
        return _shown(row)


def _add_kernels(api: FastAPI) -> None:
    sql = queries("urza")

    @api.get("/kernels")
    async def kernels(
        request: Request, blueprint_id: str | None = None, limit: Limit = 100, offset: Offset = 0
    ) -> list[dict[str, Any]]:
        found = sql.kernels(_urza(request).pool, blueprint_id=blueprint_id, limit=limit, offset=offset)
        return [_shown(r) async for r in found]

    @api.get("/kernels/{kernel_sha256}")
    async def kernel(
        request: Request, kernel_sha256: Sha256, if_none_match: Annotated[str | None, Header()] = None
    ) -> Response:
        urza, etag = _urza(request), f'"{kernel_sha256}"'
        if await sql.kernel(urza.pool, kernel_sha256=kernel_sha256) is None:
            raise HTTPException(404, f"there is no kernel {kernel_sha256}")
        headers = {"ETag": etag, "Cache-Control": "public, max-age=31536000, immutable"}
        if if_none_match == etag:
            return Response(status_code=304, headers=headers)
        try:
            data = await urza.blobs.get(kernel_sha256, max_bytes=MAX_KERNEL_BYTES)
        except ContractError as error:
            raise HTTPException(502, f"the object store broke its promise: {error}") from error
        return Response(data, media_type="application/octet-stream", headers=headers)


def _add_runs(api: FastAPI) -> None:
    sql = queries("urza")

    @api.get("/runs")
    async def runs(request: Request, limit: Limit = 100, offset: Offset = 0) -> list[dict[str, Any]]:
        return [_shown(r) async for r in sql.runs(_urza(request).pool, limit=limit, offset=offset)]

    @api.get("/runs/{run_id}")
    async def run(request: Request, run_id: str) -> dict[str, Any]:
        pool = _urza(request).pool
        row = await sql.run(pool, run_id=run_id)
        if row is None:
            raise HTTPException(404, f"there is no run {run_id!r}")
        return {**_shown(row), "seeds": [_shown(r) async for r in sql.seeds_of(pool, run_id=run_id)]}


async def _await_change(urza: Urza, event_id: UUID) -> Any:
    try:
        async with asyncio.timeout(urza.settings.change_timeout_s):
            while True:
                row = await queries("urza").change(urza.pool, event_id=event_id)
                if row is not None:
                    return row
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        return None


def _urza(request: Request) -> Urza:
    urza: Urza = request.state.urza
    return urza


def _shown(row: Any) -> dict[str, Any]:
    return {k: json.loads(v) if k in JSON_COLUMNS and v is not None else v for k, v in dict(row).items()}


def _problem(status: int, detail: str) -> JSONResponse:
    content = {
        "type": "about:blank",
        "title": _TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
    }
    return JSONResponse(content, status, media_type="application/problem+json")


_TITLES = {
    404: "Not Found",
    405: "Method Not Allowed",
    422: "Unprocessable Content",
    502: "Bad Gateway",
    503: "Service Unavailable",
}
