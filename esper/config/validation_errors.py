"""What is said about settings that are wrong: where, which key, what it is now, what it may be.

Owns the wording alone. Invariant: the value of a secret is in no complaint.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from esper.config.sources import KeyPath, Origin, Sourced, variable_of
from esper.redaction import MASK, is_secret_name, mask_text

MAX_SHOWN_CHARS = 80


def complaints(model: type[BaseModel], error: ValidationError, sourced: Sourced, at: KeyPath) -> list[str]:
    """One line for each thing that is wrong with the section at ``at``."""
    return [_complaint(model, e, sourced, at) for e in error.errors(include_url=False)]


def unknown_section(path: KeyPath, known: Iterable[str], origin: Origin | None) -> str:
    """The line about a section that nobody has, or a variable that is no setting."""
    name, sections = path[0], sorted(known)
    if origin is not None and origin.is_variable and len(path) == 1:
        close = difflib.get_close_matches(name, sections, n=1)
        hint = f"; did you mean {variable_of((close[0],))}__...?" if close else ""
        return f"{origin} (variable): no setting has this name{hint or f'; sections are {_listed(sections)}'}"
    return f"{_where(origin)}: unknown section {name!r}{_nearest(name, sections)}"


def lone_section(path: KeyPath, keys: Iterable[str], origin: Origin | None) -> str:
    """The line about a value where a section with keys must be."""
    if origin is not None and origin.is_variable:
        wanted = f"set a key of it, as in {variable_of((*path, next(iter(keys), 'key')))}"
    else:
        wanted = f"write its keys below it: {_listed(sorted(keys))}"
    return f"{_where(origin)}: {'.'.join(path)!r} is a section; {wanted}"


def not_named(what: str, path: KeyPath) -> str:
    """The line about a part that no source names."""
    return f"no {what} is named: start the embedded stack with `esper up`, or set {variable_of(path)}"


def field_at(model: Any, path: Iterable[str]) -> FieldInfo | None:
    """The field at a key path below a model; None where there is none."""
    field = None
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return None
        model = section_in(field)
    return field


def section_in(field: FieldInfo) -> Any:
    """The model inside a field that holds a section, optional or not; None for a plain value."""
    members = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((m for m in members if hasattr(m, "model_fields")), None)


def is_secret_field(field: FieldInfo | None, name: str) -> bool:
    """Whether the value of a field must not be shown."""
    members = () if field is None else (field.annotation, *getattr(field.annotation, "__args__", ()))
    return SecretStr in members or is_secret_name(name)


def _complaint(model: type[BaseModel], error: Any, sourced: Sourced, at: KeyPath) -> str:
    place = tuple(str(part) for part in error["loc"])
    path = (*at, *place)
    where, key = _where(sourced.origin_near(path)), ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown setting {key!r}{_nearest(place[-1], _keys_at(model, place[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: setting {key!r} is missing; set it there or by {variable_of(path)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return lone_section(path, _keys_at(model, place), sourced.origin_of(path))
    said = str(error["msg"]).removeprefix("Value error, ")
    if isinstance(error["input"], (Mapping, BaseModel)):
        return f"{where}: {key}: {_lowered(said)}"
    hidden = any(is_secret_field(field_at(model, place[:n]), place[n - 1]) for n in range(1, len(place) + 1))
    shown = MASK if hidden else mask_text(repr(error["input"]))[:MAX_SHOWN_CHARS]
    return f"{where}: setting {key!r} is {shown}; {_lowered(said)}"


def _where(origin: Origin | None) -> str:
    if origin is None:
        return "settings"
    # "NAME: text" would read as a secret's name and value to whoever masks this line
    return f"{origin} (variable)" if origin.is_variable else str(origin)


def _keys_at(model: Any, place: KeyPath) -> tuple[str, ...]:
    for part in place:
        field = getattr(model, "model_fields", {}).get(part)
        model = section_in(field) if field is not None else None
    return tuple(getattr(model, "model_fields", {}))


def _nearest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(word.lower(), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {_listed(names)}"


def _lowered(said: str) -> str:
    return said[:1].lower() + said[1:] if said.startswith("Input") else said


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
