"""/health: whether this process lives, and whether what it needs is there. Open to everybody."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from esper.errors import EsperError
from esper.oona.client_options import preflight_check
from esper.services.urza.api.api_context import Library
from esper.services.urza.api.pagination import RowModel
from esper.services.urza.api.parameters import PlainQuery
from esper.services.urza.api.problems import away

PART_TIMEOUT_S = 2.0
FRESH_S = 1.0  # a look serves all who ask within this time
NO_BLOB = "0" * 64

router = APIRouter(prefix="/health", tags=["health"])


class Live(RowModel):
    """The process answers."""

    status: Literal["live"]


class Ready(RowModel):
    """Everything that Urza needs is there."""

    status: Literal["ready"]
    parts: dict[str, str]


class Watch:
    """Looks at the parts, at most once in FRESH_S."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._lock = asyncio.Lock()
        self._looked_at = float("-inf")
        self._parts: dict[str, str] = {}

    async def parts(self) -> dict[str, str]:
        """Each part: ``ok``, or what is wrong with it."""
        async with self._lock:
            if time.monotonic() - self._looked_at > FRESH_S:
                self._parts, self._looked_at = await self._look(), time.monotonic()
            return self._parts

    async def _look(self) -> dict[str, str]:
        library = self._library
        looks: dict[str, Awaitable[object]] = {
            "postgres": library.rows.all("has_blueprints"),
            "kafka": preflight_check(library.settings.need_kafka()),
            "s3": library.urza.blobs.exists(NO_BLOB),
        }
        told = dict(zip(looks, await asyncio.gather(*(_tell(look) for look in looks.values())), strict=True))
        complete = "ok" if library.urza.is_ready else "not complete yet, or what keeps it is away"
        return {**told, "catalogue": complete}


@router.get("/live", response_model=Live)
async def live(_: PlainQuery) -> Response:
    """200 while the process answers."""
    return Response(to_json({"status": "live"}), media_type="application/json")


@router.get("/ready", response_model=Ready)
async def ready(request: Request, _: PlainQuery) -> Response:
    """200 when Kafka, Postgres and S3 answer and the catalogue is complete; else 503, with what is not."""
    watch: Watch = request.state.watch
    parts = await watch.parts()
    wrong = [name for name, state in parts.items() if state != "ok"]
    if wrong:
        return away(f"not ready: {', '.join(wrong)}", parts=parts)
    return Response(to_json({"status": "ready", "parts": parts}), media_type="application/json")


async def _tell(look: Awaitable[object]) -> str:
    try:
        async with asyncio.timeout(PART_TIMEOUT_S):
            await look
    except TimeoutError:
        return f"no answer within {PART_TIMEOUT_S:g} s"
    except EsperError as error:
        return str(error)
    return "ok"
