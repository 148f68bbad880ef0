"""Error messages about settings: origin, key, current value, and what is allowed.

This module owns the wording only. Invariant: no message holds the value of a secret.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from esper.config.sources import KeyPath, Origin, Sourced, variable_of
from esper.redaction import MASK, is_secret_name, mask_text

MAX_SHOWN_CHARS = 80


def error_lines(model: type[BaseModel], error: ValidationError, sourced: Sourced, section: KeyPath) -> list[str]:
    """One line for each error in a section; ``section`` is its key path, () for the top level."""
    return [_error_line(model, e, sourced, section) for e in error.errors(include_url=False)]


def unknown_section(path: KeyPath, known: Iterable[str], origin: Origin | None) -> str:
    """The message about a section that does not exist, or a variable that is not a setting."""
    name, sections = path[0], sorted(known)
    if origin is not None and origin.is_variable and len(path) == 1:
        similar = difflib.get_close_matches(name, sections, n=1)
        hint = f"; did you mean {variable_of((similar[0],))}__...?" if similar else ""
        return f"{origin} (variable): no setting has this name{hint or f'; the sections are {_listed(sections)}'}"
    return f"{_where(origin)}: unknown section {name!r}{_suggestion(name, sections)}"


def not_a_section(path: KeyPath, keys: Iterable[str], origin: Origin | None) -> str:
    """The message about a plain value in place of a section."""
    if origin is not None and origin.is_variable:
        remedy = f"set one of its keys, for example {variable_of((*path, next(iter(keys), 'key')))}"
    else:
        remedy = f"write its keys below it: {_listed(sorted(keys))}"
    return f"{_where(origin)}: {'.'.join(path)!r} is a section; {remedy}"


def missing_section(service: str, path: KeyPath) -> str:
    """The message about a service whose address no source sets."""
    return f"no address of {service} is set; start the embedded stack with `esper up`, or set {variable_of(path)}"


def section_in(field: FieldInfo) -> Any:
    """The model of a field that holds a section, optional or not; None for a plain value."""
    members = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((m for m in members if hasattr(m, "model_fields")), None)


def is_secret_field(field: FieldInfo | None, name: str) -> bool:
    """Whether the value of a field must not be shown."""
    members = () if field is None else (field.annotation, *getattr(field.annotation, "__args__", ()))
    return SecretStr in members or is_secret_name(name)


def _error_line(model: type[BaseModel], error: Any, sourced: Sourced, section: KeyPath) -> str:
    below = tuple(str(part) for part in error["loc"])
    path = (*section, *below)
    where, key = _where(sourced.origin_near(path)), ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown setting {key!r}{_suggestion(below[-1], _keys_at(model, below[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: setting {key!r} is missing; set it there or by {variable_of(path)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return not_a_section(path, _keys_at(model, below), sourced.origin_of(path))
    reason = str(error["msg"]).removeprefix("Value error, ")
    if reason.startswith("Input"):
        reason = f"input{reason.removeprefix('Input')}"
    if isinstance(error["input"], (Mapping, BaseModel)):
        return f"{where}: {key}: {reason}"
    is_secret = any(is_secret_field(_field_at(model, below[:n]), below[n - 1]) for n in range(1, len(below) + 1))
    shown = MASK if is_secret else mask_text(repr(error["input"]))[:MAX_SHOWN_CHARS]
    return f"{where}: setting {key!r} is {shown}; {reason}"


def _where(origin: Origin | None) -> str:
    if origin is None:
        return "settings"
    # without "(variable)" the line would read "SECRET_NAME: text", and masking would hide the text as a secret
    return f"{origin} (variable)" if origin.is_variable else str(origin)


def _field_at(model: Any, path: KeyPath) -> FieldInfo | None:
    field = None
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        model = section_in(field) if field is not None else None
    return field


def _keys_at(model: Any, path: KeyPath) -> tuple[str, ...]:
    field = _field_at(model, path)
    section = model if not path else section_in(field) if field is not None else None
    return tuple(getattr(section, "model_fields", {}))


def _suggestion(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    similar = difflib.get_close_matches(word.lower(), names, n=1)
    return f"; did you mean {similar[0]!r}?" if similar else f"; the known keys are {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
