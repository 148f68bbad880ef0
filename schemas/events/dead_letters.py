"""system.redrives: what became of dead letters. Keyed by the topic that they were meant for."""

from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from esper.schemas.base import Count
from esper.schemas.events.base import Event

TopicName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,200}$")]


class DeadLetterRedriven(Event):
    """A dead letter's record was sent again to the topic that it was meant for.

    ``partition`` and ``offset`` are those of the first record that could not be decoded; the letter
    lies in the same partition of the topic's dead letters, at ``letter_offset``. The record sent again
    is at ``redriven_offset`` (-1 where the broker did not say). However often a letter is redriven, its
    origin is folded once.
    """

    type: Literal["esper.dead-letter.redriven.v1"] = "esper.dead-letter.redriven.v1"
    topic: TopicName
    partition: Count
    offset: Count
    letter_offset: Count
    redriven_offset: Annotated[int, Field(ge=-1)]
    redrive_id: UUID
    reason: Annotated[str, Field(min_length=1, max_length=2000)]
