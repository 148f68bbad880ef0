"""Errors as problem+json (RFC 9457): their format, and the status of each error.

Owns every response that is not a success. Invariant: a response with a status of 400 or more is
``application/problem+json``, says what to do, and holds no traceback.
"""

import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, Field
from pydantic_core import to_json
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import compile_path

from esper.errors import ConflictError, EsperError, NotAllowedError, UnavailableError
from esper.logging import get_logger
from esper.services.urza.api.models import ApiModel

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1

_log = get_logger(__name__)


class FieldProblem(ApiModel):
    """One invalid part of a request: where (``query.limit``), and what is wrong."""

    at: str
    detail: str


class Problem(ApiModel):
    """Why a request failed, and what to do."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "there is no run 'x'"}
        },
    )

    type: str = "about:blank"
    title: str = Field(description="The status in words.")
    status: int = Field(ge=400, le=599)
    detail: str = Field(description="What is wrong with this request, and what to do.")
    instance: str | None = Field(None, description="Identifies this failure in Urza's log.")
    errors: list[FieldProblem] | None = Field(None, description="The invalid parts of the request.")
    parts: dict[str, str] | None = Field(None, description="Urza's dependencies: `ok`, or what is wrong with each.")


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    """A problem as a response. ``members`` are the further fields of ``Problem``."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, **members)
    return Response(to_json(body, exclude_none=True), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def unavailable(detail: str, **members: Any) -> Response:
    """A 503: a dependency of Urza is away, and a later retry may succeed."""
    return problem(503, detail, {"Retry-After": str(RETRY_AFTER_S)}, **members)


def not_found(what: str, name: object) -> HTTPException:
    """A 404; raise it."""
    return HTTPException(404, f"there is no {what} {str(name)!r}")


def add_problem_handlers(api: FastAPI) -> None:
    """Respond to every error with its problem."""
    api.add_exception_handler(StarletteHTTPException, _on_http_error)
    api.add_exception_handler(RequestValidationError, _on_invalid_request)
    for error_type in (UnavailableError, NotAllowedError):  # not allowed: the dependency refuses Urza, not the caller
        api.add_exception_handler(error_type, _on_unavailable)
    api.add_exception_handler(ConflictError, _on_conflict)
    api.add_exception_handler(Exception, _on_failure)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed_methods(request))
        return problem(405, f"{request.method} is not allowed here; see the Allow header", headers)
    if error.status_code == 404 and error.detail == "Not Found":
        return problem(404, f"nothing is at {request.url.path}; /openapi.json lists all paths")
    if error.status_code == 400:  # FastAPI raises it for bytes that are not UTF-8
        return problem(422, "body: not JSON in UTF-8")
    return problem(error.status_code, str(error.detail), headers)


def _allowed_methods(request: Request) -> list[str]:
    """Every method of this path: the router names those of the first matching route only."""
    paths = request.app.openapi()["paths"]
    return sorted({m.upper() for p in paths if compile_path(p)[0].match(request.url.path) for m in paths[p]})


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != "application/json":
        return problem(415, "the body is not JSON; send Content-Type: application/json")
    found = _field_problems(error.errors())
    return problem(422, "; ".join(f"{f.at}: {f.detail}" for f in found), errors=found)


def _field_problems(errors: Sequence[Any]) -> list[FieldProblem]:
    """What pydantic found, without the values: a request may hold what must not reach a log."""
    return [FieldProblem(at=".".join(str(p) for p in e["loc"]), detail=e["msg"]) for e in errors]


async def _on_unavailable(_request: Request, error: Exception) -> Response:
    return unavailable(str(error))


async def _on_conflict(_request: Request, error: Exception) -> Response:
    return problem(409, str(error))


async def _on_failure(request: Request, error: Exception) -> Response:
    instance = uuid.uuid4().urn
    cause = f"{type(error).__name__}: {error}" if isinstance(error, EsperError) else type(error).__name__
    _log.error("request.failed", instance=instance, path=request.url.path, error=cause, exc_info=error)
    return problem(500, "Urza failed; its log has the cause under `instance`", instance=instance)
