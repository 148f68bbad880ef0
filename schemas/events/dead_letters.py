"""system.redrives: dead letters that were sent again. Keyed by the topic that they were meant for."""

from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from esper.schemas.base import MAX_INT32, MAX_INT64, Count, Remark
from esper.schemas.events.base import Event

TopicName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,200}$")]


class DeadLetterRedriven(Event):
    """The record of a dead letter was sent again to the topic that it was meant for.

    ``partition`` and ``offset`` are those of the first record that could not be decoded. The dead letter is in the same
    partition of the topic's dead letters, at ``letter_offset``. The record sent again is at ``redriven_offset`` (-1
    where the broker did not report it). Projections apply one origin once, however often its dead letter is redriven.
    """

    type: Literal["esper.dead-letter.redriven.v1"] = "esper.dead-letter.redriven.v1"
    topic: TopicName
    partition: Annotated[int, Field(ge=0, le=MAX_INT32)]
    offset: Count
    letter_offset: Count
    redriven_offset: Annotated[int, Field(ge=-1, le=MAX_INT64)]
    redrive_id: UUID
    reason: Remark
