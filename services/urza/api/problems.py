"""Errors as problem+json (RFC 9457): what they look like, and which error becomes which.

Owns every answer that is no success. Invariant: an answer with a status of 400 or more is
``application/problem+json`` and says what to do; none holds a traceback.
"""

import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import compile_path

from esper.errors import ConflictError, EsperError, KernelError, NotAllowedError, UnavailableError
from esper.logging import get_logger

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1

_log = get_logger(__name__)


class FieldProblem(BaseModel):
    """One thing that is wrong with a request: where (``query.limit``), and what."""

    model_config = ConfigDict(extra="forbid")

    at: str
    detail: str


class Problem(BaseModel):
    """Why a request was not carried out, and what to do."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "there is no run 'x'"}
        },
    )

    type: str = "about:blank"
    title: str = Field(description="The status in words.")
    status: int = Field(ge=400, le=599)
    detail: str = Field(description="What is wrong with this request, and what to do.")
    instance: str | None = Field(None, description="Names this one failure in Urza's log.")
    errors: list[FieldProblem] | None = Field(None, description="Each thing that is wrong with the request.")
    parts: dict[str, str] | None = Field(None, description="Each part that Urza needs: `ok`, or what is wrong.")


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    """An answer that says why not. ``members`` are the further fields of ``Problem``."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, **members)
    return Response(to_json(body, exclude_none=True), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def away(detail: str, **members: Any) -> Response:
    """Something that Urza needs is away: trying again later may help."""
    return problem(503, detail, {"Retry-After": str(RETRY_AFTER_S)}, **members)


def not_found(what: str, name: object) -> HTTPException:
    """There is no such thing; raise it."""
    return HTTPException(404, f"there is no {what} {str(name)!r}")


def add_problems(api: FastAPI) -> None:
    """Turn every error into its problem."""
    api.add_exception_handler(StarletteHTTPException, _http)
    api.add_exception_handler(RequestValidationError, _invalid)
    for error_type in (UnavailableError, NotAllowedError):  # Urza is refused, not who asked Urza
        api.add_exception_handler(error_type, _away)
    api.add_exception_handler(KernelError, _broken_store)
    api.add_exception_handler(ConflictError, _conflict)
    api.add_exception_handler(Exception, _failed)


def field_problems(errors: Sequence[Any]) -> list[FieldProblem]:
    """What pydantic found, without repeating values: a request may hold what is in no log's interest."""
    return [FieldProblem(at=".".join(str(p) for p in e["loc"]), detail=e["msg"]) for e in errors]


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
        return problem(405, f"{request.method} is not done here", headers)
    if error.status_code == 404 and error.detail == "Not Found":
        return problem(404, f"nothing is at {request.url.path}; /openapi.json says what is where")
    if error.status_code == 400:  # FastAPI's word for bytes that are no UTF-8
        return problem(422, "body: it is no JSON in UTF-8")
    return problem(error.status_code, str(error.detail), headers)


def _allowed(request: Request) -> list[str]:
    """Every method that is answered at this path: the router names those of the first route alone."""
    paths = request.app.openapi()["paths"]
    return sorted({m.upper() for p in paths if compile_path(p)[0].match(request.url.path) for m in paths[p]})


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != "application/json":
        return problem(415, "send a body of Content-Type: application/json")
    found = field_problems(error.errors())
    return problem(422, "; ".join(f"{f.at}: {f.detail}" for f in found), errors=found)


async def _away(_request: Request, error: Exception) -> Response:
    return away(str(error))


async def _broken_store(_request: Request, error: Exception) -> Response:
    _log.error("kernel.check_failed", error=str(error))
    return problem(502, f"the object store broke its promise: {error}")


async def _conflict(_request: Request, error: Exception) -> Response:
    return problem(409, str(error))


async def _failed(request: Request, error: Exception) -> Response:
    instance = uuid.uuid4().urn
    cause = f"{type(error).__name__}: {error}" if isinstance(error, EsperError) else type(error).__name__
    _log.error("request.failed", instance=instance, path=request.url.path, error=cause, exc_info=error)
    return problem(500, "Urza failed; its log has the reason under `instance`", instance=instance)
