"""Upcasters: functions that convert the value of an old event version to the next version.

An upcaster is pure: it takes the decoded JSON object of ``esper.<noun>.<verb>.v<n>`` and returns that of ``v<n+1>``.
``upcast`` sets ``type``. All other code uses the newest models alone. An upcaster is never deleted, since the log is
kept forever.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

EVENT_TYPE = re.compile(r"(?P<name>esper(?:\.[a-z0-9-]+){2})\.v(?P<version>[1-9][0-9]{0,5})")
"""Use ``fullmatch``: ``match`` would accept a trailing newline."""

Value = dict[str, Any]
Upcaster = Callable[[Value], Value]


def _unchanged(value: Value) -> Value:
    """The next version accepts more values; those of the old version keep their meaning."""
    return value


def _as_before_after(value: Value) -> Value:
    """A report of version 1 becomes method before_after, whatever method it has: it has no data of a fork."""
    return {**value, "method": "before_after"}


UPCASTERS: Mapping[str, Upcaster] = MappingProxyType(
    {
        # v2 adds conv1d layers
        "esper.blueprint-change.requested.v1": _unchanged,
        "esper.kernel.registered.v1": _unchanged,
        "esper.run.started.v1": _unchanged,
        # v2 adds effective_rank, which v1 did not measure
        "esper.layer-health.measured.v1": _unchanged,
        # v2 adds fork; v1 had no data of how a fork was made, and no program ever wrote one
        "esper.adaptation.reported.v1": _as_before_after,
    }
)
"""Old type -> its upcaster."""


def next_version(event_type: str) -> str:
    """The name of the next version of an event type.

    Raises:
        ValueError: ``event_type`` is not the name of an event type.
    """
    match = EVENT_TYPE.fullmatch(event_type)
    if match is None:
        raise ValueError(f"{event_type!r} is not the name of an event type; use esper.<noun>.<verb>.v<n>")
    return f"{match['name']}.v{int(match['version']) + 1}"


def versions_from(event_type: str, upcasters: Mapping[str, Upcaster]) -> Iterator[str]:
    """The type and every version that it is converted to, in order; the last has no upcaster."""
    yield event_type
    while event_type in upcasters:
        event_type = next_version(event_type)
        yield event_type


def upcast(event_type: str, value: Value, upcasters: Mapping[str, Upcaster]) -> Value:
    """The value converted to the newest version. ``value`` itself is not changed."""
    for version in versions_from(event_type, upcasters):
        if version in upcasters:
            value = {**upcasters[version](dict(value)), "type": next_version(version)}
    return value
