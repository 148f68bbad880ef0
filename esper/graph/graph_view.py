"""The graph view of a run at a boundary: the input of a decision, and its canonical bytes.

``esper.graph.assembly`` builds it from rows; ``esper.graph.view_features`` defines each value.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, Self

from esper.errors import ContractError
from esper.graph.columnar_sequence import ColumnarSequence
from esper.graph.health_windows import FIELDS
from esper.graph.view_bytes import TABLES, Columns, columns_of, decode, encode
from esper.graph.view_features import VIEW_VERSION, Level
from esper.schemas.enums import BreakerState, LayerKind, SeedStage

NO_HEALTH: Mapping[str, float | None] = MappingProxyType(dict.fromkeys(FIELDS))
"""The health of a layer or seed without signals."""


@dataclass(frozen=True, slots=True)
class LayerView:
    """A layer. ``health`` has the means over the signals of all its seeds in the newest complete window."""

    layer_id: str
    kind: LayerKind
    num_features: int
    num_parameters: int
    num_seeds: int
    health: Mapping[str, float | None]
    non_finite_ratio: float | None
    health_change: Mapping[str, float | None] = field(default_factory=lambda: NO_HEALTH)
    num_signals: int | None = None


@dataclass(frozen=True, slots=True)
class SeedView:
    """A seed at the boundary. ``health`` is as in ``LayerView``, for its chunk of the channels."""

    layer_id: str
    seed_id: int
    stage: SeedStage
    since_step: int
    blueprint_id: str | None
    num_parameters: int
    germinated_at_step: int | None
    health: Mapping[str, float | None]
    health_change: Mapping[str, float | None] = field(default_factory=lambda: NO_HEALTH)
    non_finite_ratio: float | None = None
    num_signals: int | None = None
    steps_in_stage: int | None = None
    num_germinations: int | None = None
    num_given_up: int | None = None
    breaker: BreakerState | None = None
    num_failures: int | None = None
    num_rejections: int | None = None


@dataclass(frozen=True, slots=True)
class EpochView:
    """The metrics at the end of an epoch, and their differences to the epoch before."""

    epoch: int
    step: int
    metrics: Mapping[str, float | None]
    gains: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KernelView:
    """A kernel of a certified blueprint that can be germinated."""

    blueprint_id: str
    blueprint_version: int
    kernel_sha256: str
    size_bytes: int
    target: LayerKind
    num_features: int
    num_parameters: int


@dataclass(frozen=True)
class GraphView:
    """All inputs of a decision. ``to_bytes`` gives its canonical form, ``digest`` identifies it.

    A value is None where it is unknown: never measured, or missing in the version that the view was read from.
    """

    run_id: str
    incarnation: int
    boundary: int
    step: int
    epoch: int
    layers: Sequence[LayerView]
    edges: tuple[tuple[str, str], ...]
    seeds: Sequence[SeedView]
    epochs: tuple[EpochView, ...]
    kernels: Sequence[KernelView]
    num_epochs: int = -1
    window_step: int | None = None
    planned_epochs: int | None = None
    progress: float | None = None
    steps_since_start: int | None = None
    num_telemetry_lost: int | None = None
    num_rejections: int | None = None
    blueprint_offsets: tuple[int, ...] = ()
    view_version: int = field(default=VIEW_VERSION, init=False)

    def __post_init__(self) -> None:
        if self.num_epochs < 0:  # not given: ``epochs`` are all epochs of the run
            object.__setattr__(self, "num_epochs", len(self.epochs))

    def to_bytes(self) -> bytes:
        """Canonical JSON: keys sorted, no spaces, floats in their shortest exact form."""
        return self._data

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a view of this version or an older one. Values that an older version does not have are None.

        ``digest`` is that of the newest form: compare a recorded digest with the digest of ``data`` itself.

        Raises:
            ContractError: ``data`` is not a view.
            NewerVersionError: a newer program wrote the view.
        """
        columns = decode(data)
        run = columns[Level.RUN]
        try:
            found = cls._from_columns(run, columns)
            referenced = {*columns[Level.SEED]["layer_id"], *chain.from_iterable(found.edges)}
            if unknown := referenced - found.layer_rows.keys():
                raise ValueError(f"a seed or edge names an unknown layer, {min(map(str, unknown))!r}")
        except (TypeError, ValueError) as error:
            raise ContractError(f"not a graph view: {error}") from error
        return found

    @classmethod
    def _from_columns(cls, run: Columns, columns: Mapping[Level, Columns]) -> Self:
        return cls(
            **{name: values[0] for name, values in run.items() if name != "blueprint_offsets"},
            blueprint_offsets=tuple(run["blueprint_offsets"][0] or ()),
            layers=ColumnarSequence(LayerView, Level.LAYER, columns[Level.LAYER]),
            edges=tuple(zip(columns[Level.EDGE]["source"], columns[Level.EDGE]["target"], strict=True)),
            seeds=ColumnarSequence(SeedView, Level.SEED, columns[Level.SEED]),
            epochs=tuple(ColumnarSequence(EpochView, Level.EPOCH, columns[Level.EPOCH])),
            kernels=ColumnarSequence(KernelView, Level.KERNEL, columns[Level.KERNEL]),
        )

    @cached_property
    def columns(self) -> Mapping[Level, Columns]:
        """Level -> feature -> values, for layers, seeds, epochs and kernels: the layout of the bytes."""
        return {level: _columns(level, getattr(self, t)) for level, t in TABLES.items() if level is not Level.EDGE}

    @cached_property
    def layer_rows(self) -> Mapping[str, int]:
        """Layer id -> its index in ``layers``."""
        return {layer_id: n for n, layer_id in enumerate(self.columns[Level.LAYER]["layer_id"])}

    @cached_property
    def _data(self) -> bytes:
        return encode(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ``to_bytes``, in hex."""
        return digest_of(self.to_bytes())


def _columns(level: Level, objects: Sequence[Any]) -> Columns:
    return objects.columns if isinstance(objects, ColumnarSequence) else columns_of(level, objects)


def digest_of(data: bytes) -> str:
    """The digest that identifies a view's bytes: their SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()
