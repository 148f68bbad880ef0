"""The application: routes, errors, and the layers around them, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from esper.config import Settings
from esper.services.urza.api.api_context import Library
from esper.services.urza.api.auth import RequestAuth
from esper.services.urza.api.openapi import describe
from esper.services.urza.api.problems import add_problems
from esper.services.urza.api.projection_reader import Rows, Versions
from esper.services.urza.api.response_cache import LruCache, ResponseCache
from esper.services.urza.api.routes import blueprints, changes, dead_letters, decisions, health, kernels, runs
from esper.services.urza.settings import check_exposure
from esper.services.urza.urza_service import Urza

MIB = 1024 * 1024


def make_api(urza: Urza, settings: Settings) -> FastAPI:
    """The API of an Urza that is open, and that its opener closes once the API has ended.

    Raises:
        ConfigError: other hosts would be let in without a token.
    """
    check_exposure(urza.settings)
    rows = Rows(urza.pool, settings.need_postgres())
    library = Library(urza, settings, rows, Versions(rows))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {"library": library, "watch": health.Watch(library)}

    api = FastAPI(title="Urza", version="1", lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    visibility = "private" if urza.settings.has_tokens else "public"
    shelf = LruCache(int(urza.settings.cache_mib * MIB))
    api.add_middleware(ResponseCache, shelf=shelf, versions=library.versions, visibility=visibility)
    api.add_middleware(RequestAuth, own=urza.settings)  # outermost: the last one added
    add_problems(api)
    for router in (
        health.router,
        blueprints.router,
        changes.nested,
        changes.router,
        kernels.router,
        runs.router,
        decisions.router,
        dead_letters.router,
    ):
        api.include_router(router)
    describe(api, urza.settings)
    return api
