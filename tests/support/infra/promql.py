"""PromQL: the series that an expression reads, and the value of a simple expression on the samples of one scrape.

``evaluate`` supports instant selectors, numbers, comparisons, and/or/unless on equal labels, sum, max, min and count.
It rejects functions that need a history (rate, increase), for which promtool has rule tests.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Samples = Mapping[str, Vector]
"""Values by name and labels of a series."""

OVER_RANGES = ("rate", "increase", "irate", "delta", "deriv")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}
_AGGREGATE: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "max": max,
    "min": min,
    "count": lambda values: float(len(values)),
}


@dataclass
class Reading:
    """Inputs of an expression: selectors as (name, matchers, function over a range), and the labels that it groups by."""

    selectors: list[tuple[str, dict[str, str], str | None]] = field(default_factory=list)
    grouped: list[str] = field(default_factory=list)


def parse(expression: str) -> Any:
    """Parse an expression, with valid values in place of Grafana's variables."""
    text = re.sub(r"\$__(rate_)?interval", "5m", expression)
    return promql.parse(re.sub(r"\$\{?\w+\}?", ".*", text))


def read(expression: str) -> Reading:
    """The inputs of an expression."""
    reading = Reading()
    _read(parse(expression), reading, None)
    return reading


def samples_of(scraped: str, **labels: str) -> Samples:
    """Series of a scrape. ``labels`` are the labels that Prometheus adds: job, instance."""
    found: dict[str, Vector] = {}
    for family in text_string_to_metric_families(scraped):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset({**sample.labels, **labels}.items())] = sample.value
    return found


def evaluate(expression: str, samples: Samples) -> Vector | float:
    """The value of a simple expression. Of an alert: the series that it fires for."""
    return _value(parse(expression), samples)


def _read(node: Any, reading: Reading, function: str | None) -> None:
    match node:
        case promql.VectorSelector():
            matchers = {m.name: m.value for m in node.matchers.matchers}
            reading.selectors.append((node.name, matchers, function))
        case promql.MatrixSelector():
            _read(node.vector_selector, reading, function)
        case promql.Call():
            name = node.func.name if node.func.name in OVER_RANGES else function
            for argument in node.args:
                _read(argument, reading, name)
        case promql.AggregateExpr():
            reading.grouped += node.modifier.labels if node.modifier else []
            _read(node.expr, reading, function)
        case promql.BinaryExpr():
            _read(node.lhs, reading, function)
            _read(node.rhs, reading, function)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            _read(node.expr, reading, function)


def _value(node: Any, samples: Samples) -> Vector | float:
    match node:
        case promql.NumberLiteral():
            return float(node.val)
        case promql.ParenExpr():
            return _value(node.expr, samples)
        case promql.VectorSelector() if node.offset is None and node.at is None:
            return {k: v for k, v in samples.get(node.name, {}).items() if _matches(node, dict(k))}
        case promql.AggregateExpr() if str(node.op) in _AGGREGATE:
            return _aggregated(node, samples)
        case promql.BinaryExpr():
            return _combined(node, samples)
    raise NotImplementedError(f"{node} needs a history; use a rule test of promtool")


def _matches(node: Any, labels: Mapping[str, str]) -> bool:
    def agrees(matcher: Any) -> bool:
        value = labels.get(matcher.name, "")
        is_pattern, is_negated = "Re" in str(matcher.op), "Not" in str(matcher.op)
        is_equal = re.fullmatch(matcher.value, value) is not None if is_pattern else matcher.value == value
        return is_equal != is_negated

    return all(agrees(m) for m in node.matchers.matchers)


def _aggregated(node: Any, samples: Samples) -> Vector:
    inner = _value(node.expr, samples)
    assert isinstance(inner, dict)
    kept = set(node.modifier.labels) if node.modifier else set()
    groups: dict[Labels, list[float]] = {}
    for labels, value in inner.items():
        groups.setdefault(frozenset((n, v) for n, v in labels if n in kept), []).append(value)
    return {labels: _AGGREGATE[str(node.op)](values) for labels, values in groups.items()}


def _combined(node: Any, samples: Samples) -> Vector | float:
    left, right, operator = _value(node.lhs, samples), _value(node.rhs, samples), str(node.op)
    if isinstance(left, dict) and isinstance(right, dict):
        match operator:
            case "unless":
                return {k: v for k, v in left.items() if k not in right}
            case "and":
                return {k: v for k, v in left.items() if k in right}
            case "or":
                return {**right, **left}
    if isinstance(left, dict) and isinstance(right, float) and operator in _COMPARE:
        holds = _COMPARE[operator]
        if node.modifier is not None and node.modifier.return_bool:
            return {k: float(holds(v, right)) for k, v in left.items()}
        return {k: v for k, v in left.items() if holds(v, right)}
    raise NotImplementedError(f"{node} needs a history; use a rule test of promtool")


def legend_labels(text: str) -> Iterator[str]:
    """Labels that a legend or an annotation uses."""
    yield from re.findall(r"{{\s*(?:\$labels\.)?(\w+)\s*}}", text)
