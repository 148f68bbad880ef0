"""The base classes of events: each carries its type, and a trainer's events also their position in the run."""

from esper.schemas.base import Count, FrozenContract, Incarnation, RunId, Sequence


class Event(FrozenContract):
    """The value of one record. ``type`` is the discriminator of the closed union."""

    type: str


class RunEvent(Event):
    """An event of one incarnation of one run; keyed by the run."""

    run_id: RunId
    incarnation: Incarnation


class TrainerEvent(RunEvent):
    """An event written by a trainer. ``sequence`` counts all events of the incarnation, over all topics.

    It increases strictly within one topic, so that readers detect a resend by it.
    """

    sequence: Sequence
    step: Count
