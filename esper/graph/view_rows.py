"""The rows of the projections that a view is assembled from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ViewRows:
    """The rows of one boundary's view, in any order.

    They may include rows beyond the boundary, which ``assemble`` leaves out; see
    docs/design/decisions/0017-view-determinism.md for the rule of each table.

    Attributes:
        boundary: with ``hyperparameters`` of the run and ``from_step`` of the incarnation.
        lineage: the boundary's own incarnation and those that it resumed from, each with the ``lifecycle_sequence``
            up to which its transitions count.
        resumed_seeds: the seeds of the incarnation's checkpoint.
        epochs: the newest ``MAX_EPOCHS`` of the lineage.
        num_epochs: the number of all epochs of the lineage.
        windows: health windows, and late signals in the same form, of any step.
        blueprint_offsets: partition of innovation.blueprints -> the offset up to which its records count.
    """

    boundary: Row
    layers: Sequence[Row]
    edges: Sequence[Row]
    lineage: Sequence[Row]
    resumed_seeds: Sequence[Row]
    lifecycle: Sequence[Row]
    breakers: Sequence[Row]
    rejections: Sequence[Row]
    epochs: Sequence[Row]
    num_epochs: int
    gaps: Sequence[Row]
    windows: Sequence[Row]
    kernels: Sequence[Row]
    blueprint_offsets: Sequence[int]
