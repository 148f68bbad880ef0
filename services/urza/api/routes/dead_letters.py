"""/dead-letters: records of the log that could not be decoded, and whether they were redriven."""

from fastapi import APIRouter, Request, Response
from pydantic import Field

from esper.schemas.base import ShortName
from esper.schemas.topics import TOPICS
from esper.services.urza.api.pagination import INT4, INT8, TEXT, Listing, Page, PageQuery, RowModel
from esper.services.urza.api.parameters import Queried

router = APIRouter(tags=["dead letters"])

ALL = Listing(
    "dead_letters",
    [("after_topic", "topic", TEXT), ("after_partition", "log_partition", INT4), ("after_offset", "log_offset", INT8)],
)


class DeadLetterShown(RowModel):
    """A record that workers passed over, by its place in the log; `esper dlq show` has its bytes."""

    topic: str
    log_partition: int
    log_offset: int
    reason: str
    detail: str
    event_id: str | None
    is_redriven: bool


class LetterQuery(PageQuery):
    """Which letters."""

    topic: ShortName | None = Field(None, description="Those of this topic.", examples=["system.runs"])


@router.get("/dead-letters", response_model=Page[DeadLetterShown])
async def list_dead_letters(request: Request, query: Queried[LetterQuery]) -> Response:
    """Dead letters, in the order of the log."""
    return await ALL.page(request, query, [t.name for t in TOPICS], topic=query.topic)
