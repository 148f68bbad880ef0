"""The features of a graph view: every column in a view's bytes, declared once.

``esper.graph.view_bytes`` writes and reads views by this table, docs/reference/view-features.md is generated from
it, and the GNN policy takes its inputs from it. So a view has no feature that is not declared here. A new column, or a
column with another meaning, needs a new ``VIEW_VERSION``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from esper.graph.health_windows import FIELDS, WINDOW_STEPS
from esper.schemas.enums import BreakerState, LayerKind, SeedStage

VIEW_VERSION = 2
RECENT_STEPS = 16 * WINDOW_STEPS
"""The span of ``num_rejections`` before a boundary, in optimizer steps. Part of the view version."""

MAX_EPOCHS = 256
"""The number of newest epochs whose metrics a view holds. Part of the view version."""


class Level(StrEnum):
    """The object that a feature describes. A view has one run, and any number of the others."""

    RUN = "run"
    LAYER = "layer"
    EDGE = "edge"
    SEED = "seed"
    EPOCH = "epoch"
    KERNEL = "kernel"


class Kind(StrEnum):
    """The type of a feature's values."""

    ID = "id"  # an identifier, no input of a model
    CATEGORY = "category"  # one of a closed vocabulary
    COUNT = "count"  # an integer, at least 0
    REAL = "real"  # a finite float64
    MAP = "map"  # named reals


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of a view. ``unit`` includes the range; with ``is_nullable`` a value can be missing.

    ``attribute`` is the attribute of a view's objects that holds it: ``field``, or ``field.key`` of a mapping.
    """

    level: Level
    name: str
    kind: Kind
    unit: str
    formula: str
    source: str
    is_nullable: bool = False
    since: int = 1
    attribute: str = ""

    @property
    def attribute_path(self) -> tuple[str, str | None]:
        """(field, key); the key is None where the field itself is the value."""
        field, _dot, key = (self.attribute or self.name).partition(".")
        return field, key or None


_HEALTH_UNITS = {
    "health_score": "0..1",
    "activation_mean": "output's own unit",
    "activation_std": "output's own unit, 0..",
    "dead_ratio": "0..1",
    "gradient_norm": "L2 norm, 0..",
}
_OWNERS = {Level.LAYER: "of all the layer's seeds", Level.SEED: "of the seed"}


def _health(level: Level) -> tuple[Feature, ...]:
    owner, real = _OWNERS[level], Kind.REAL
    means = [
        Feature(level, f, real, _HEALTH_UNITS[f], f"sum / count of the signals {owner} in the window",
                "health_windows", True, attribute=f"health.{f}")
        for f in FIELDS
    ]  # fmt: skip
    changes = [
        Feature(level, f"{f}_change", real, f"as {f}, signed", f"{f} in the window - {f} in the window before it",
                "health_windows", True, 2, f"health_change.{f}")
        for f in FIELDS
    ]  # fmt: skip
    since = {Level.LAYER: 1, Level.SEED: 2}[level]
    return (
        *means,
        *changes,
        Feature(level, "non_finite_ratio", real, "0..1", f"signals {owner} in the window with a statistic that was "
                "not finite / all of them", "health_windows", True, since),
        Feature(level, "num_signals", Kind.COUNT, "signals", f"signals {owner} in the window", "health_windows",
                since=2, is_nullable=True),
    )  # fmt: skip


def _run() -> tuple[Feature, ...]:
    run, count = Level.RUN, Kind.COUNT
    return (
        Feature(run, "run_id", Kind.ID, "", "the run", "boundaries"),
        Feature(run, "incarnation", count, "1..", "the incarnation that reached the boundary", "boundaries"),
        Feature(run, "boundary", count, "1..", "the boundary's number", "boundaries"),
        Feature(run, "step", count, "optimizer steps", "the step at the boundary", "boundaries"),
        Feature(run, "epoch", count, "epochs", "the current epoch at the boundary", "boundaries"),
        Feature(run, "window_step", count, "optimizer steps", f"first step of the newest window of {WINDOW_STEPS} "
                "steps that ended at or before `step`; null before the first", "boundaries", True, 2),
        Feature(run, "num_epochs", count, "epochs", "epochs completed on the run's lineage; the view holds the "
                f"newest {MAX_EPOCHS}", "epochs", since=2),
        Feature(run, "planned_epochs", count, "epochs", "hyperparameter `epochs`; null where it is missing or is "
                "not a positive 64-bit integer", "runs", True, 2),
        Feature(run, "progress", Kind.REAL, "0..1", "min(1, num_epochs / planned_epochs)", "epochs, runs", True, 2),
        Feature(run, "steps_since_start", count, "optimizer steps", "step - the step at which this incarnation "
                "started or resumed", "incarnations", True, 2),
        Feature(run, "num_telemetry_lost", count, "records", "sum of num_lost over the incarnation's telemetry gaps "
                "that overlap the window or the one before it", "telemetry_gaps", True, 2),
        Feature(run, "num_rejections", count, "commands", f"commands rejected in the last {RECENT_STEPS} steps",
                "rejections", True, 2),
        Feature(run, "blueprint_offsets", Kind.ID, "offsets", "projected offset of each partition of "
                "innovation.blueprints when the view was read: kernels and changes before it are in the view",
                "positions", since=2),
    )  # fmt: skip


def _layers() -> tuple[Feature, ...]:
    layer, count = Level.LAYER, Kind.COUNT
    return (
        Feature(layer, "layer_id", Kind.ID, "", "qualified name in the model; rows are in the model's order", "layers"),
        Feature(layer, "kind", Kind.CATEGORY, "LayerKind", "the module's kind", "layers"),
        Feature(layer, "num_features", count, "channels", "width of the output", "layers"),
        Feature(layer, "num_parameters", count, "parameters", "of the layer, without seeds", "layers"),
        Feature(layer, "num_seeds", count, "seeds", "seeds of the layer", "layers"),
        *_health(layer),
    )


def _edges() -> tuple[Feature, ...]:
    return (
        Feature(Level.EDGE, "source", Kind.ID, "", "layer whose output flows into `target`", "edges"),
        Feature(Level.EDGE, "target", Kind.ID, "", "layer that reads it, through modules that hold no seeds", "edges"),
    )


def _seeds() -> tuple[Feature, ...]:
    seed, count = Level.SEED, Kind.COUNT
    return (
        Feature(seed, "layer_id", Kind.ID, "", "the seed's layer", "layers"),
        Feature(seed, "seed_id", Kind.ID, "0..1023", "its number in the layer", "layers"),
        Feature(seed, "stage", Kind.CATEGORY, "SeedStage", "stage at the boundary", "lifecycle, incarnations"),
        Feature(seed, "since_step", count, "optimizer steps", "step of the last transition", "lifecycle, incarnations"),
        Feature(seed, "blueprint_id", Kind.ID, "", "blueprint that grows in it", "lifecycle, incarnations", True),
        Feature(seed, "num_parameters", count, "parameters", "of the module that grows in it; 0 while dormant",
                "lifecycle"),
        Feature(seed, "germinated_at_step", count, "optimizer steps", "step of the last germination", "lifecycle",
                True),
        *_health(seed),
        Feature(seed, "steps_in_stage", count, "optimizer steps", "step - since_step", "boundaries, lifecycle",
                True, 2),
        Feature(seed, "num_germinations", count, "times", "number of germinations on the run's lineage", "lifecycle",
                True, 2),
        Feature(seed, "num_given_up", count, "times", "number of times that it was cancelled, culled or rolled back",
                "lifecycle", True, 2),
        Feature(seed, "breaker", Kind.CATEGORY, "BreakerState", "state of its breaker in this incarnation",
                "breaker_changes", True, 2),
        Feature(seed, "num_failures", count, "failures", "failures in a row at the breaker's last change",
                "breaker_changes", True, 2),
        Feature(seed, "num_rejections", count, "commands", f"commands for it rejected in the last {RECENT_STEPS} steps",
                "rejections", True, 2),
    )  # fmt: skip


def _epochs() -> tuple[Feature, ...]:
    epoch = Level.EPOCH
    return (
        Feature(epoch, "epoch", Kind.COUNT, "epochs", "its number", "epochs"),
        Feature(epoch, "step", Kind.COUNT, "optimizer steps", "the step at its end", "epochs"),
        Feature(epoch, "metrics", Kind.MAP, "as reported", "metrics that the loop reported; null where not "
                "finite", "epochs"),
        Feature(epoch, "gains", Kind.MAP, "as reported, signed", "metric - the same metric of the epoch before it "
                "in the view; null where either is missing", "epochs", since=2),
    )  # fmt: skip


def _kernels() -> tuple[Feature, ...]:
    kernel, count, table = Level.KERNEL, Kind.COUNT, "kernels"
    return (
        Feature(kernel, "blueprint_id", Kind.ID, "", "a certified blueprint", "blueprint_changes"),
        Feature(kernel, "blueprint_version", Kind.ID, "1..", "the version that it was compiled from", table),
        Feature(kernel, "kernel_sha256", Kind.ID, "", "SHA-256 of the weights; of several kernels of one blueprint, "
                "target and width the one of the highest version, and of these the last registered", table),
        Feature(kernel, "size_bytes", count, "bytes", "size in S3", table),
        Feature(kernel, "target", Kind.CATEGORY, "LayerKind", "kind of layers that it fits", table),
        Feature(kernel, "num_features", count, "channels", "width that it fits", table),
        Feature(kernel, "num_parameters", count, "parameters", "parameters that it adds", table),
    )  # fmt: skip


FEATURES: Mapping[Level, tuple[Feature, ...]] = MappingProxyType(
    {
        Level.RUN: _run(),
        Level.LAYER: _layers(),
        Level.EDGE: _edges(),
        Level.SEED: _seeds(),
        Level.EPOCH: _epochs(),
        Level.KERNEL: _kernels(),
    }
)
"""Level -> its features, in the order of the docs and of the GNN's inputs."""

VOCABULARIES: Mapping[str, type[StrEnum]] = MappingProxyType(
    {"kind": LayerKind, "target": LayerKind, "stage": SeedStage, "breaker": BreakerState}
)
"""Name of a category feature -> the enum of its values."""


def value_of(item: Any, feature: Feature) -> Any:
    """The value of a feature for a view's object: the view itself, or one of its layers, seeds, epochs or kernels."""
    field, key = feature.attribute_path
    value = getattr(item, field)
    return value if key is None else value.get(key)
