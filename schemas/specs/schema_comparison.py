"""Compares two JSON Schemas as pydantic writes them, and says what became narrower or wider where.

Narrower: a value that fitted the old schema may not fit the new one. Wider: the other way round. What
cannot be compared (patterns, conditions between fields) counts as both. Texts for people (titles,
descriptions) are no part of a shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]

_FOR_PEOPLE = frozenset({"$schema", "$id", "$defs", "$comment", "title", "description", "examples"})
_LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_COMPARED = frozenset(
    {"type", "anyOf", "enum", "const", "default", "pattern", "properties", "required", "additionalProperties"}
    | {"propertyNames", "items", *_LOWER, *_UPPER}
)


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. ``path`` names the field: ``signals[].epoch``, ``metrics{}``; empty for the whole value."""

    path: str
    what: str
    narrower: bool = False
    wider: bool = False


def compare(old: Schema, new: Schema) -> list[Change]:
    """All differences in shape, outermost first; none means that both accept the same values."""
    return list(_nodes(_inline(old, old), _inline(new, new), ""))


def _inline(node: Any, root: Schema) -> Any:
    """The node with every ``$ref`` replaced by what it names, and without texts for people."""
    if isinstance(node, list):
        return [_inline(n, root) for n in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        beside = {k: v for k, v in node.items() if k != "$ref"}
        return _inline({**root["$defs"][node["$ref"].removeprefix("#/$defs/")], **beside}, root)
    kept = {k: v for k, v in node.items() if k not in _FOR_PEOPLE}
    fields = kept.pop("properties", None)  # a field may have the name of a keyword
    inlined = {k: v if k in ("default", "const", "enum") else _inline(v, root) for k, v in kept.items()}
    return inlined if fields is None else {**inlined, "properties": {k: _inline(v, root) for k, v in fields.items()}}


def _nodes(old: Schema, new: Schema, path: str) -> Iterator[Change]:
    if old == new:
        return
    if old.get("default") != new.get("default"):
        what = f"default {old.get('default')!r} became {new.get('default')!r}"
        yield Change(path, what, narrower=True, wider=True)
    olds, news = _alternatives(old), _alternatives(new)
    for kind in (k for k in olds if k not in news and not _covers(news, k)):
        yield Change(path, f"{kind} is no longer allowed", narrower=True)
    for kind in (k for k in news if k not in olds and not _covers(olds, k)):
        yield Change(path, f"{kind} is allowed now", wider=True)
    for kind in (k for k in olds if k in news):
        yield from _same_kind(olds[kind], news[kind], path)


def _alternatives(node: Schema) -> dict[str, Schema]:
    """JSON type -> schema; two alternatives of one type are numbered."""
    found: dict[str, Schema] = {}
    for one in node.get("anyOf", [node]):
        kind = str(one.get("type", "any value"))
        found[f"{kind} ({len(found) + 1})" if kind in found else kind] = one
    return found


def _covers(kinds: dict[str, Schema], kind: str) -> bool:
    return kind == "integer" and "number" in kinds


def _same_kind(old: Schema, new: Schema, path: str) -> Iterator[Change]:
    yield from _values(old, new, path)
    for keyword in (*_LOWER, *_UPPER):
        yield from _bound(keyword, old.get(keyword), new.get(keyword), path)
    if old.get("pattern") != new.get("pattern"):
        yield _rule(f"pattern {old.get('pattern')} became {new.get('pattern')}", "pattern", old, new, path)
    yield from _fields(old, new, path)
    for keyword, mark in (("items", "[]"), ("propertyNames", "{key}")):
        yield from _nodes(old.get(keyword, {}), new.get(keyword, {}), path + mark)
    yield from _other_fields(old.get("additionalProperties", True), new.get("additionalProperties", True), path)
    for keyword in sorted((old.keys() | new.keys()) - _COMPARED):
        if old.get(keyword) != new.get(keyword):
            yield _rule(f"the rule {keyword!r} changed", keyword, old, new, path)


def _rule(what: str, keyword: str, old: Schema, new: Schema, path: str) -> Change:
    return Change(path, what, narrower=keyword in new, wider=keyword in old)


def _values(old: Schema, new: Schema, path: str) -> Iterator[Change]:
    before, after = _listed(old), _listed(new)
    if before is None and after is not None:
        yield Change(path, f"only {_told(after)} are allowed now", narrower=True)
    elif before is not None and after is None:
        yield Change(path, "any value is allowed now", wider=True)
    elif before is not None and after is not None:
        if gone := [v for v in before if v not in after]:
            yield Change(path, f"{_told(gone)} is no longer allowed", narrower=True)
        if added := [v for v in after if v not in before]:
            yield Change(path, f"{_told(added)} is allowed now", wider=True)


def _listed(node: Schema) -> list[Any] | None:
    return [node["const"]] if "const" in node else node.get("enum")


def _told(values: list[Any]) -> str:
    return ", ".join(map(repr, values))


def _bound(keyword: str, old: float | None, new: float | None, path: str) -> Iterator[Change]:
    if old == new:
        return
    rose = old is not None and new is not None and new > old
    is_narrower = new is not None and (old is None or rose == (keyword in _LOWER))
    what = f"{keyword} {'none' if old is None else old} became {'none' if new is None else new}"
    yield Change(path, what, narrower=is_narrower, wider=not is_narrower)


def _fields(old: Schema, new: Schema, path: str) -> Iterator[Change]:
    before, after = old.get("properties", {}), new.get("properties", {})
    must_before, must_after = set(old.get("required", ())), set(new.get("required", ()))
    for name in sorted(before.keys() | after.keys()):
        inner = f"{path}.{name}" if path else name
        if name not in after:
            yield Change(inner, "the field was removed", narrower=True, wider=name in must_before)
        elif name not in before:
            word = "required" if name in must_after else "optional"
            yield Change(inner, f"a field was added ({word})", narrower=name in must_after, wider=True)
        else:
            yield from _nodes(before[name], after[name], inner)
            if (name in must_before) != (name in must_after):
                is_narrower = name in must_after
                word = "is required now" if is_narrower else "may be left out now"
                yield Change(inner, f"the field {word}", narrower=is_narrower, wider=not is_narrower)


def _other_fields(old: bool | Schema, new: bool | Schema, path: str) -> Iterator[Change]:
    if old is not False and new is not False:
        yield from _nodes({} if old is True else old, {} if new is True else new, path + "{}")
    elif old != new:
        what = "unknown fields are refused now" if new is False else "unknown fields are allowed now"
        yield Change(path, what, narrower=new is False, wider=old is False)
