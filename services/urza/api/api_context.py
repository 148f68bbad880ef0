"""What the handlers of one API share."""

from dataclasses import dataclass

from fastapi import Request

from esper.config import Settings
from esper.services.urza.api.topic_versions import TopicVersions
from esper.services.urza.projection_reader import ProjectionReader
from esper.services.urza.urza_service import Urza


@dataclass(frozen=True, slots=True)
class ApiContext:
    """An open Urza, the settings of its process, and the versions that cached responses are compared with."""

    urza: Urza
    settings: Settings
    versions: TopicVersions

    @property
    def reader(self) -> ProjectionReader:
        """Reads the projections."""
        return self.urza.reader


def api_context(request: Request) -> ApiContext:
    """The context that the lifespan of the request's application created."""
    context: ApiContext = request.state.context
    return context
