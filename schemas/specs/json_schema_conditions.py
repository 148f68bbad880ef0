"""Rules between fields in JSON Schema: the checks of a model's after-validator, for readers without Python.

Each model with such a rule states it twice, in code and with ``when``; tests/contract checks that both refuse the same
values.
"""

from typing import Any

Condition = dict[str, Any]

NOT_NULL: Condition = {"not": {"type": "null"}}
NOT_EMPTY: Condition = {"minItems": 1}
NULL: Condition = {"type": "null"}
"""Also accepts a missing field: every such field has null as its default."""


def when(
    field: str,
    value: str | bool,
    then: dict[str, Condition] | None = None,
    otherwise: dict[str, Condition] | None = None,
    *,
    is_default: bool = False,
) -> Condition:
    """Where ``field`` is ``value``, the fields in ``then`` must satisfy their conditions; else those in ``otherwise``.

    With ``is_default`` a missing field counts as ``value``.
    """
    test: Condition = {"properties": {field: {"const": value}}}
    if not is_default:
        test["required"] = [field]
    rule: Condition = {"if": test}
    if then is not None:
        rule["then"] = _all_of(then)
    if otherwise is not None:
        rule["else"] = _all_of(otherwise)
    return rule


def _all_of(fields: dict[str, Condition]) -> Condition:
    required = [name for name, condition in fields.items() if condition in (NOT_NULL, NOT_EMPTY)]
    return {"properties": dict(fields)} | ({"required": required} if required else {})
