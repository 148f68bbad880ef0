"""What every event carries: its type, and for a trainer's events the place in their run."""

from esper.schemas.base import Count, FrozenContract, Incarnation, RunId, Sequence


class Event(FrozenContract):
    """The value of one record. ``type`` tells the members of the closed union apart."""

    type: str


class RunEvent(Event):
    """About one incarnation of one run; keyed by the run."""

    run_id: RunId
    incarnation: Incarnation


class TrainerEvent(RunEvent):
    """Written by a trainer. ``sequence`` counts all events of the incarnation, over all topics.

    Within one topic it only rises, so a resend is known by it.
    """

    sequence: Sequence
    step: Count
