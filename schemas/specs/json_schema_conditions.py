"""Rules between fields, said in JSON Schema: what a model's after-validator checks, for readers without Python.

Each model that has such a rule states it twice, in code and here; tests/contract sees that
both refuse the same values.
"""

from typing import Any

Condition = dict[str, Any]

NOT_NULL: Condition = {"not": {"type": "null"}}
NOT_EMPTY: Condition = {"minItems": 1}
NULL: Condition = {"type": "null"}
"""Missing counts as null: every such field has null as its default."""


def when(
    field: str,
    value: str | bool,
    then: dict[str, Condition] | None = None,
    otherwise: dict[str, Condition] | None = None,
    *,
    is_default: bool = False,
) -> Condition:
    """Where ``field`` is ``value``, the fields in ``then`` must be so; else those in ``otherwise``.

    ``is_default`` says that a missing field counts as ``value``.
    """
    asked: Condition = {"properties": {field: {"const": value}}}
    if not is_default:
        asked["required"] = [field]
    said: Condition = {"if": asked}
    if then is not None:
        said["then"] = _all_of(then)
    if otherwise is not None:
        said["else"] = _all_of(otherwise)
    return said


def _all_of(fields: dict[str, Condition]) -> Condition:
    required = [name for name, condition in fields.items() if condition in (NOT_NULL, NOT_EMPTY)]
    return {"properties": dict(fields)} | ({"required": required} if required else {})
