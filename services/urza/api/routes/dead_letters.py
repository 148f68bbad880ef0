"""/dead-letters: records of the log that could not be decoded, and whether they were redriven."""

from fastapi import APIRouter, Request, Response
from pydantic import Field

from esper.schemas.base import ShortName
from esper.schemas.topics import TOPICS
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.pagination import INT4, INT8, TEXT, Listing, Page, PageQuery
from esper.services.urza.api.parameters import QueryOf

router = APIRouter(tags=["dead letters"])

ALL = Listing(
    "dead_letters",
    [("after_topic", "topic", TEXT), ("after_partition", "log_partition", INT4), ("after_offset", "log_offset", INT8)],
)


class DeadLetterResponse(ApiModel):
    """A record that workers skipped, by its position in the log; `esper dlq show` prints its bytes."""

    topic: str
    log_partition: int
    log_offset: int
    reason: str
    detail: str
    event_id: str | None
    is_redriven: bool


class DeadLetterQuery(PageQuery):
    """Filters of dead letters."""

    topic: ShortName | None = Field(None, description="Of this topic.", examples=["system.runs"])


@router.get("/dead-letters", response_model=Page[DeadLetterResponse])
async def list_dead_letters(request: Request, query: QueryOf[DeadLetterQuery]) -> Response:
    """All dead letters, in the order of the log."""
    return await ALL.page(request, query, [t.name for t in TOPICS], topic=query.topic)
