"""Assembles the application: routes, error handlers and middleware."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from esper.config import Settings
from esper.services.urza.api.api_context import ApiContext
from esper.services.urza.api.auth import RequestAuth
from esper.services.urza.api.openapi import publish_openapi
from esper.services.urza.api.problems import add_problem_handlers
from esper.services.urza.api.response_cache import CachedResponse, ResponseCache
from esper.services.urza.api.routes import blueprints, changes, dead_letters, decisions, health, kernels, runs
from esper.services.urza.api.topic_versions import TopicVersions
from esper.services.urza.lru_cache import LruCache
from esper.services.urza.settings import check_exposure
from esper.services.urza.urza_service import Urza

MIB = 1024 * 1024
MAX_RESPONSE_SHARE = 4  # one response may take a quarter of the cache


def make_api(urza: Urza, settings: Settings) -> FastAPI:
    """The API of an open Urza, which the caller closes after the API ends.

    Raises:
        ConfigError: it would serve other hosts without a token.
    """
    check_exposure(urza.settings)
    context = ApiContext(urza, settings, TopicVersions(urza.reader))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {"context": context, "readiness": health.ReadinessProbe(context)}

    api = FastAPI(title="Urza", version="1", lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    visibility = "private" if urza.settings.has_tokens else "public"
    cache_bytes = int(urza.settings.cache_mib * MIB)
    cache: LruCache[bytes, CachedResponse] = LruCache(cache_bytes, cache_bytes // MAX_RESPONSE_SHARE)
    api.add_middleware(ResponseCache, cache=cache, versions=context.versions, visibility=visibility)
    api.add_middleware(RequestAuth, settings=urza.settings)  # outermost: the last one added
    add_problem_handlers(api)
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
    publish_openapi(api, urza.settings)
    return api
