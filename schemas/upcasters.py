"""How old versions of events are read: one function a version, from its value to the next one's.

An upcaster is pure, takes the decoded JSON object of ``esper.<noun>.<verb>.v<n>`` and returns that of
``v<n+1>``; it never touches ``type``, which the chain sets. Code knows the newest models alone.
An upcaster is never deleted: the log is kept for ever.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

EVENT_TYPE = re.compile(r"(?P<name>esper(?:\.[a-z0-9-]+){2})\.v(?P<version>[1-9][0-9]{0,5})")
"""Match with ``fullmatch``: a trailing newline is no part of a type."""

Value = dict[str, Any]
Upcaster = Callable[[Value], Value]


def _only_wider(value: Value) -> Value:
    """The next version allows more, and means the same by what the old one allowed."""
    return value


def _not_a_fork(value: Value) -> Value:
    """A report of the first version is a record, whatever method it names: its horizon is not known."""
    return {**value, "method": "before_after"}


UPCASTERS: Mapping[str, Upcaster] = MappingProxyType(
    {
        # v2 knows conv1d layers
        "esper.blueprint-change.requested.v1": _only_wider,
        "esper.kernel.registered.v1": _only_wider,
        "esper.run.started.v1": _only_wider,
        # v2 has effective_rank, which nobody took before
        "esper.layer-health.measured.v1": _only_wider,
        # v2 has fork; what v1 told as a fork said nothing of how it was made, and nothing ever wrote one
        "esper.adaptation.reported.v1": _not_a_fork,
    }
)
"""Old type -> its upcaster."""


def next_version(event_type: str) -> str:
    """The type that comes after this one.

    Raises:
        ValueError: it is not the name of an event type.
    """
    match = EVENT_TYPE.fullmatch(event_type)
    if match is None:
        raise ValueError(f"{event_type!r} is not esper.<noun>.<verb>.v<n>")
    return f"{match['name']}.v{int(match['version']) + 1}"


def versions_from(event_type: str, upcasters: Mapping[str, Upcaster]) -> Iterator[str]:
    """The type and what it is read as, one version after the other; the last has no upcaster."""
    yield event_type
    while event_type in upcasters:
        event_type = next_version(event_type)
        yield event_type


def upcast(event_type: str, value: Value, upcasters: Mapping[str, Upcaster]) -> Value:
    """The value as the newest version has it; ``value`` itself is left as it is."""
    for version in versions_from(event_type, upcasters):
        if version in upcasters:
            value = {**upcasters[version](dict(value)), "type": next_version(version)}
    return value
