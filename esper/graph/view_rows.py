"""What a view is made of, as it lies in the tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ViewRows:
    """The rows of one boundary's view, in any order.

    Rows beyond the boundary may be among them, and are left out by ``assemble``; see
    docs/design/decisions/0017-view-determinism.md for the rule of each table.

    Attributes:
        boundary: with ``hyperparameters`` of the run and ``from_step`` of the incarnation.
        line: the incarnations on the live line, the boundary's own included, each with the
            ``lifecycle_sequence`` up to which its transitions count.
        resumed_seeds: what the incarnation's checkpoint held.
        epochs: the newest ``MAX_EPOCHS`` on the live line, ``num_epochs`` of which there are.
        windows: health windows, and late signals in the same form, of any step.
        blueprint_offsets: partition of innovation.blueprints -> how far it counts.
    """

    boundary: Row
    layers: Sequence[Row]
    edges: Sequence[Row]
    line: Sequence[Row]
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
