"""/health: whether this process is alive, and whether its dependencies answer. Needs no token."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from esper.errors import EsperError
from esper.oona.client_options import preflight_check
from esper.services.urza.api.api_context import ApiContext
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.parameters import NoParameters
from esper.services.urza.api.problems import unavailable

CHECK_TIMEOUT_S = 2.0
MAX_AGE_S = 1.0  # one check serves all requests within this time
ABSENT_BLOB = "0" * 64

router = APIRouter(prefix="/health", tags=["health"])


class LiveResponse(ApiModel):
    """The process responds."""

    status: Literal["live"]


class ReadyResponse(ApiModel):
    """All dependencies of Urza answer, and the catalogue is complete."""

    status: Literal["ready"]
    parts: dict[str, str]


class ReadinessProbe:
    """Checks the dependencies, at most once in ``MAX_AGE_S``."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._lock = asyncio.Lock()
        self._checked_at = float("-inf")
        self._parts: dict[str, str] = {}

    async def parts(self) -> dict[str, str]:
        """Each dependency: ``ok``, or what is wrong with it."""
        async with self._lock:
            if time.monotonic() - self._checked_at > MAX_AGE_S:
                self._parts, self._checked_at = await self._check(), time.monotonic()
            return self._parts

    async def _check(self) -> dict[str, str]:
        context = self._context
        checks: dict[str, Awaitable[object]] = {
            "postgres": context.reader.all("has_blueprints"),
            "kafka": preflight_check(context.settings.need_kafka()),
            "s3": context.urza.blobs.exists(ABSENT_BLOB),
        }
        states = await asyncio.gather(*map(_state_of, checks.values()))
        catalogue = "ok" if context.urza.is_ready else "not complete yet, or one of its dependencies is away"
        return {**dict(zip(checks, states, strict=True)), "catalogue": catalogue}


@router.get("/live", response_model=LiveResponse)
async def live(_: NoParameters) -> Response:
    """200 while the process responds."""
    return Response(to_json({"status": "live"}), media_type="application/json")


@router.get("/ready", response_model=ReadyResponse)
async def ready(request: Request, _: NoParameters) -> Response:
    """200 when Kafka, Postgres and S3 answer and the catalogue is complete; otherwise 503, with what is wrong."""
    probe: ReadinessProbe = request.state.readiness
    parts = await probe.parts()
    wrong = [name for name, state in parts.items() if state != "ok"]
    if wrong:
        return unavailable(f"not ready: {', '.join(wrong)}", parts=parts)
    return Response(to_json({"status": "ready", "parts": parts}), media_type="application/json")


async def _state_of(check: Awaitable[object]) -> str:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await check
    except TimeoutError:
        return f"no answer within {CHECK_TIMEOUT_S:g} s"
    except EsperError as error:
        return str(error)
    return "ok"
