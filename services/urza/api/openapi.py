"""The published OpenAPI document: FastAPI's, completed with problems, headers and tokens.

Owns ``/openapi.json``. Invariant: an operation lists every status that it can respond with.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from esper.services.urza.api.problems import MEDIA_TYPE, RETRY_AFTER_S, Problem
from esper.services.urza.settings import UrzaSettings

DESCRIPTION = """What can grow in a network (blueprints and kernels), where it grew, and why.

Lists are pages: follow `next`. Responses carry an `ETag`: send it as `If-None-Match`. A change goes through the log;
its `Idempotency-Key` makes a retry safe. Errors are `application/problem+json` (RFC 9457)."""
BEARER = "token"
STATUS_DESCRIPTIONS = {
    400: "The Host header does not name this Urza.",
    401: "No token, or an unknown one.",
    403: "The token may read only.",
    404: "It does not exist.",
    409: "Another request was sent under this Idempotency-Key.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "The request does not match this document.",
    500: "Urza failed.",
    502: "The object store does not have what the log says.",
    503: "A dependency of Urza is away: retry later.",
}
_GENERATED = ("HTTPValidationError", "ValidationError")


def publish_openapi(api: FastAPI, settings: UrzaSettings) -> None:
    """Replace the document that FastAPI generates."""
    cached: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not cached:
            cached.update(_document(api, settings))
        return cached

    api.openapi = openapi  # type: ignore[method-assign]


def _document(api: FastAPI, settings: UrzaSettings) -> dict[str, Any]:
    document = get_openapi(title=api.title, version=api.version, description=DESCRIPTION, routes=api.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in _GENERATED:
        schemas.pop(name, None)
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs", {}))
    schemas["Problem"] = problem
    _close_patterns(schemas)
    if settings.has_tokens:
        components["securitySchemes"] = {
            BEARER: {"type": "http", "scheme": "bearer", "description": "A reader's or a writer's token."}
        }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_operation(path, method, operation, settings)
    return document


def _close_patterns(schema: Any) -> None:
    """Publish that keys must match their pattern: pydantic enforces it, and does not publish it."""
    if isinstance(schema, dict):
        if "patternProperties" in schema:
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            _close_patterns(part)


def _complete_operation(path: str, method: str, operation: dict[str, Any], settings: UrzaSettings) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    is_health = path.startswith("/health")
    for status in _error_statuses(path, method, operation, settings.has_tokens):
        responses[str(status)] = _problem_response(status)
    if settings.has_tokens and not is_health:
        operation["security"] = [{BEARER: []}]
    if method == "get" and not is_health:
        tag = {"ETag": {"schema": {"type": "string"}, "required": True, "description": "Identifies these bytes."}}
        responses["200"]["headers"] = tag
        responses["304"] = {"description": "The response that If-None-Match names is current.", "headers": tag}
    if "202" in responses:
        responses["202"]["description"] = "In the log and not projected yet: `status` is the address of its verdict."


def _error_statuses(path: str, method: str, operation: dict[str, Any], has_tokens: bool) -> list[int]:
    found = [422, 500, 503]
    if not path.startswith("/health"):
        found += [401] if has_tokens else [400]
    if "{" in path or any(p["name"] == "cursor" for p in operation.get("parameters", ())):
        found.append(404)
    if method == "post":
        found += [409, 413, 415] + ([403] if has_tokens else [])
    if path.startswith("/kernels/"):
        found.append(502)
    return sorted(found)


def _problem_response(status: int) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    response: dict[str, Any] = {"description": STATUS_DESCRIPTIONS[status], "content": content}
    if status == 503:
        header = {"schema": {"type": "integer", "example": RETRY_AFTER_S}, "required": True}
        response["headers"] = {"Retry-After": {**header, "description": "Seconds."}}
    if status == 401:
        response["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}}
    return response
