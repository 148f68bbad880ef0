"""What the handlers of one API hold in common."""

from dataclasses import dataclass, field

from fastapi import Request

from esper.config import Settings
from esper.oona.producer import OonaProducer
from esper.services.urza.api.projection_reader import Rows, Versions
from esper.services.urza.urza_service import Urza


@dataclass(slots=True)
class Library:
    """An open Urza, read through ``rows``. ``asked`` remembers what was asked under an Idempotency-Key."""

    urza: Urza
    settings: Settings
    rows: Rows
    versions: Versions
    asked: dict[str, str] = field(default_factory=dict)

    @property
    def producer(self) -> OonaProducer:
        """Writes to the log."""
        return self.urza.producer


def library_of(request: Request) -> Library:
    """The library that a request is about."""
    library: Library = request.state.library
    return library
