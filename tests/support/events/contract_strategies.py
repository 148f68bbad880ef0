"""Hypothesis strategies built from the contract models, so that a new model or field is tested without further work.

``values_of(model)`` draws from the types and constraints of the fields. Rules between fields are not covered by that:
``_REPAIRS`` has a function for each model with such a rule, which changes drawn fields until they satisfy it.
"""

import base64
import math
import types
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from uuid import UUID

import annotated_types as at
from hypothesis import strategies as st
from pydantic import Base64Bytes, BaseModel, StringConstraints
from pydantic.fields import FieldInfo

from esper.schemas.assets import Seed
from esper.schemas.base import TEXT_PATTERN
from esper.schemas.enums import Action, BlueprintChange, EvaluationVerdict, ReportMethod, SeedStage
from esper.schemas.events import (
    BlueprintChangeRequested,
    DecisionMade,
    FieldReported,
    KernelRegistered,
    LayerHealthMeasured,
    PolicyEvaluated,
)
from esper.schemas.events.seeds import END_STAGES
from esper.schemas.operational import STATISTICS, HealthSignal

MAX_ITEMS, MAX_CHARS = 4, 40
BASE64 = get_args(Base64Bytes)[1]
Fields = dict[str, Any]


def values_of(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Valid instances of a model, built through its constructor."""
    drawn = {name: _field_strategy(field) for name, field in model.model_fields.items()}
    if model is HealthSignal:
        sick = st.sampled_from([math.nan, math.inf, -math.inf])
        drawn |= {name: drawn[name] | sick for name in STATISTICS}
    repair = _REPAIRS.get(model, lambda fields: fields)
    return st.fixed_dictionaries(drawn).map(lambda fields: model(**repair(fields)))


def _field_strategy(field: FieldInfo) -> st.SearchStrategy[Any]:
    return _type_strategy(field.annotation, field.metadata)


def _type_strategy(kind: Any, constraints: Iterable[Any]) -> st.SearchStrategy[Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_strategy(inner[0], [*constraints, *_flat(inner[1:])])
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        return st.one_of(*(_type_strategy(one, ()) for one in inner))
    limits = _limits(constraints)
    if origin is tuple:
        return st.lists(_type_strategy(inner[0], ()), min_size=limits.get("min_size", 0), max_size=MAX_ITEMS).map(tuple)
    if origin is dict:
        return st.dictionaries(_type_strategy(inner[0], ()), _type_strategy(inner[1], ()), max_size=MAX_ITEMS)
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    if issubclass(kind, BaseModel):
        return values_of(kind)
    return _PLAIN[kind](limits)


def _flat(constraints: Iterable[Any]) -> list[Any]:
    return [m for c in constraints for m in (c.metadata if isinstance(c, FieldInfo) else [c])]


def _limits(constraints: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for c in _flat(constraints):
        for one in c if isinstance(c, at.GroupedMetadata) and not isinstance(c, StringConstraints) else [c]:
            if isinstance(one, StringConstraints):
                found |= {"min_size": one.min_length or 0, "max_size": one.max_length, "pattern": one.pattern}
            elif one is BASE64:
                found["base64"] = True
            for name, attribute in _LIMITS.items():
                if getattr(one, attribute, None) is not None:
                    found[name] = getattr(one, attribute)
    return found


_LIMITS = {
    "ge": "ge",
    "gt": "gt",
    "le": "le",
    "lt": "lt",
    "min_size": "min_length",
    "max_size": "max_length",
    "pattern": "pattern",
}


def _ints(limits: Fields) -> st.SearchStrategy[int]:
    highest = limits["lt"] - 1 if "lt" in limits else limits.get("le")
    ends = [end for end in (limits.get("ge"), highest) if end is not None]
    return st.integers(limits.get("ge"), highest) | st.sampled_from(ends or [0])


def _floats(limits: Fields) -> st.SearchStrategy[float]:
    return st.floats(
        min_value=limits.get("gt", limits.get("ge")),
        max_value=limits.get("le"),
        exclude_min="gt" in limits,
        allow_nan=False,
        allow_infinity=False,
    )


def _texts(limits: Fields) -> st.SearchStrategy[str]:
    pattern = limits.get("pattern")
    if pattern is not None and pattern != TEXT_PATTERN:
        return st.from_regex(pattern.replace("$", r"\Z"), fullmatch=True)
    characters = st.characters(exclude_characters="\x00" if pattern else "", exclude_categories=["Cs"])
    return st.text(
        characters, min_size=limits.get("min_size", 0), max_size=min(limits.get("max_size") or MAX_CHARS, MAX_CHARS)
    )


def _bytes(limits: Fields) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=MAX_CHARS).map(base64.b64encode if limits.get("base64") else bytes)


_PLAIN: dict[Any, Callable[[Fields], st.SearchStrategy[Any]]] = {
    bool: lambda _limits: st.booleans(),
    int: _ints,
    float: _floats,
    str: _texts,
    bytes: _bytes,
    UUID: lambda _limits: st.uuids(),
    types.NoneType: lambda _limits: st.none(),
}


def _repair_signal(fields: Fields) -> Fields:
    is_sick = fields["non_finite"] or any(
        f is not None and not math.isfinite(f) for f in (fields[s] for s in STATISTICS)
    )
    return {**fields, "health_score": 0.0} if is_sick else fields


def _repair_health_report(fields: Fields) -> Fields:
    own = {"layer_id": fields["layer_id"]}
    return {**fields, "signals": tuple(s.model_copy(update=own) for s in fields["signals"])}


def _repair_seed(fields: Fields) -> Fields:
    is_dormant = fields["blueprint_id"] is None
    return {**fields, "stage": SeedStage.DORMANT} if is_dormant else fields


def _repair_decision(fields: Fields) -> Fields:
    action = Action.WAIT if fields["stale"] else fields["action"]
    target = {"layer_id": None, "seed_id": None} if action is Action.WAIT else {
        "layer_id": fields["layer_id"] or "fc1", "seed_id": fields["seed_id"] or 0
    }  # fmt: skip
    blueprint = fields["blueprint_id"] or "noop" if action is Action.GERMINATE else None
    digest = None if fields["stale"] else fields["view_digest"] or "0" * 64
    return {**fields, "action": action, **target, "blueprint_id": blueprint, "view_digest": digest}


def _repair_field_report(fields: Fields) -> Fields:
    is_fork = fields["fork"] is not None
    outcome = fields["outcome"] if is_fork or fields["outcome"] in END_STAGES else SeedStage.CULLED
    return {**fields, "method": ReportMethod.FORK if is_fork else ReportMethod.BEFORE_AFTER, "outcome": outcome}


def _repair_blueprint_change(fields: Fields) -> Fields:
    is_proposal = fields["spec"] is not None
    change = fields["change"]
    other = BlueprintChange.RETIRE if change is BlueprintChange.PROPOSE else change
    return {**fields, "change": BlueprintChange.PROPOSE if is_proposal else other}


def _repair_evaluation(fields: Fields) -> Fields:
    is_whole = None not in (fields["estimate"], fields["low"], fields["high"]) and fields["held_out_runs"]
    return fields if is_whole else {**fields, "verdict": EvaluationVerdict.TOO_THIN}


_REPAIRS: dict[type[BaseModel], Callable[[Fields], Fields]] = {
    HealthSignal: _repair_signal,
    LayerHealthMeasured: _repair_health_report,
    Seed: _repair_seed,
    DecisionMade: _repair_decision,
    BlueprintChangeRequested: _repair_blueprint_change,
    PolicyEvaluated: _repair_evaluation,
    FieldReported: _repair_field_report,
    KernelRegistered: lambda fields: {**fields, "blueprint_id": fields["kernel"].blueprint_id},
}
