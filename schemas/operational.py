"""Health signals: operational data of a layer at one step.

Owns the model and its two rules: a statistic that is not finite becomes null, and the health score of such a signal
is 0. A layer's report has many signals, so the first rule runs only where Python builds a signal and never while JSON
is parsed, which has no NaN: a before-validator there would convert every signal to a dict first and double the time.
"""

import math
from typing import Annotated, Any

from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from esper.schemas.base import FrozenContract, NonNegative, SeedId, UnitInterval
from esper.schemas.specs.json_schema_conditions import when

STATISTICS = ("activation_mean", "activation_std", "dead_ratio", "gradient_norm", "effective_rank")


def _non_finite_becomes_null(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    lost = [n for n in STATISTICS if isinstance(v := values.get(n), float) and not math.isfinite(v)]
    return {**values, **dict.fromkeys(lost), "non_finite": True} if lost else values


def _check_score(signal: "HealthSignal") -> "HealthSignal":
    if signal.non_finite and signal.health_score > 0.0:
        raise ValueError("health_score must be 0 where a statistic is not finite; set it to 0")
    return signal


class HealthSignal(FrozenContract):
    """The health of one seed's chunk of a layer's output at one sampled step.

    A layer's output channels are divided among its seeds; ``chunk_id`` names the part that the seed watches. A
    statistic is null where it was not measured (no gradient yet, a rank too expensive to compute), or where it was not
    finite: then ``non_finite`` is true, since JSON has no NaN and signals of failing layers must not be lost.
    ``health_score`` is 1 for healthy, 0 for dead; ``esper.kasmina.health`` has its formula.
    """

    model_config = ConfigDict(json_schema_extra=when("non_finite", True, then={"health_score": {"const": 0}}))

    # not a LayerId: the report checks that it equals the layer_id of the report, which is validated
    layer_id: Annotated[str, Field(min_length=1, max_length=255)]
    seed_id: SeedId
    chunk_id: SeedId
    epoch: Annotated[int, Field(ge=0)]
    health_score: UnitInterval
    activation_mean: float | None = None
    activation_std: NonNegative | None = None
    dead_ratio: UnitInterval | None = None
    gradient_norm: NonNegative | None = None
    effective_rank: NonNegative | None = None
    non_finite: bool = False

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        model = handler(source)
        if handler.resolve_ref_schema(model)["type"] == "function-after":
            return model  # pydantic calls this again with the schema below wherever a signal is a field
        either = core_schema.json_or_python_schema(
            json_schema=model,
            python_schema=core_schema.no_info_before_validator_function(_non_finite_becomes_null, model),
        )
        # The after-validator must be outermost: then pydantic-core builds it once, not at each level.
        return core_schema.no_info_after_validator_function(_check_score, either)


class CheckedByReport:
    """Annotation of a signal inside a report that checks the scores of all its signals at once.

    Parsing JSON then calls no Python code for each signal; pydantic still validates its fields.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        checked = handler.resolve_ref_schema(handler(source))
        assert checked["type"] == "function-after"
        either = checked["schema"]
        assert either["type"] == "json-or-python"
        return core_schema.json_or_python_schema(json_schema=either["json_schema"], python_schema=checked)
