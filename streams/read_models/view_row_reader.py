"""Reads the rows of graph views, for one boundary or many with the same number of queries.

Invariant: the rows of one call come from one snapshot, since the caller holds a REPEATABLE READ transaction; and the
rows of a boundary do not depend on which other boundaries are read with it.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from esper.errors import UnavailableError
from esper.graph.health_windows import WINDOW_STEPS, last_complete_window
from esper.graph.view_features import MAX_EPOCHS, RECENT_STEPS
from esper.graph.view_rows import Row, ViewRows
from esper.schemas.topics import BLUEPRINTS, LIFECYCLE, TELEMETRY
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries

BoundaryName = tuple[str, int, int]
"""(run, incarnation, boundary)."""

RowsByBoundary = Mapping[int, Sequence[Row]]
"""Index of the boundary in the call -> its rows of one table."""


async def read_view_rows(
    connection: Connection, run_id: str, incarnation: int, boundary: int, blueprint_offsets: Sequence[int] | None = None
) -> ViewRows:
    """Read the rows of one boundary's view. Call it inside a REPEATABLE READ transaction.

    Once a boundary is complete, the same boundary and offsets always give the same view.

    Args:
        blueprint_offsets: the offsets of innovation.blueprints, by partition, as of which kernels are read, to
            reproduce an earlier view; the stored positions if None.

    Raises:
        UnavailableError: the boundary is not projected.
    """
    (found,) = await read_many_view_rows(connection, [(run_id, incarnation, boundary)], blueprint_offsets)
    if found is None:
        raise UnavailableError(
            f"boundary {boundary} of {run_id}, incarnation {incarnation}, is not projected yet; retry later"
        )
    return found


async def read_many_view_rows(
    connection: Connection, names: Sequence[BoundaryName], blueprint_offsets: Sequence[int] | None = None
) -> list[ViewRows | None]:
    """Read the rows of many views, in their order; None for a boundary that is not projected."""
    found = await boundary_rows(connection, names)
    if not found:
        return [None] * len(names)
    offsets = await _blueprint_offsets(connection) if blueprint_offsets is None else tuple(blueprint_offsets)
    rows = dict(zip(found, await _Reader(connection, list(found.values())).read(offsets), strict=True))
    return [rows.get(n) for n in range(len(names))]


async def boundary_rows(connection: Connection, names: Sequence[BoundaryName]) -> dict[int, dict[str, Any]]:
    """The boundary's own row by index in ``names``, without the boundaries that are not projected."""
    run_ids, incarnations, boundaries = (list(column) for column in zip(*names, strict=True))
    rows = queries("views").boundaries(connection, run_ids=run_ids, incarnations=incarnations, boundaries=boundaries)
    return {r["n"] - 1: {**r, "last_sequences": json.loads(r["last_sequences"])} async for r in rows}


class _Reader:
    """Reads the rows of some boundaries, one query per table."""

    def __init__(self, connection: Connection, boundaries: Sequence[Row]) -> None:
        self._connection, self._boundaries, self._sql = connection, boundaries, queries("views")
        self._lifecycle_sequences = [b["last_sequences"].get(LIFECYCLE.name, -1) for b in boundaries]
        self._newest_windows = [last_complete_window(b["step"]) for b in boundaries]
        self._run = {"run_ids": [b["run_id"] for b in boundaries]}
        self._incarnations = {**self._run, "incarnations": [b["incarnation"] for b in boundaries]}
        self._before = {**self._incarnations, "log_offsets": [b["log_offset"] for b in boundaries]}

    async def read(self, offsets: tuple[int, ...]) -> list[ViewRows]:
        sql, connection = self._sql, self._connection
        sent = {**self._incarnations, "sequences": self._lifecycle_sequences}
        lineages = await self._lineages()
        layers = await _by_index(sql.layers(connection, **self._run))
        edges = await _by_index(sql.edges(connection, **self._run))
        lifecycle = await self._lifecycle(lineages)
        breakers = await _by_index(sql.breakers(connection, **sent))
        after = [b["step"] - RECENT_STEPS for b in self._boundaries]
        rejections = await _by_index(sql.rejections(connection, **sent, after_steps=after))
        epochs = await _by_index(sql.epochs(connection, **self._before, max_epochs=MAX_EPOCHS))
        first = [window - WINDOW_STEPS for window in self._newest_windows]
        gaps = await _by_index(sql.gaps(connection, **self._before, from_steps=first))
        windows = await self._windows(first)
        kernels = await self._kernels(layers, offsets)
        return [
            ViewRows(
                boundary={
                    **boundary,
                    "hyperparameters": json.loads(boundary["hyperparameters"] or "{}"),
                    "from_step": boundary["from_step"] or 0,
                },
                layers=layers.get(n, ()) if _is_started(boundary) else (),
                edges=edges.get(n, ()) if _is_started(boundary) else (),
                lineage=lineages[n],
                resumed_seeds=json.loads(boundary["seeds"] or "[]"),
                lifecycle=lifecycle.get(n, ()),
                breakers=breakers.get(n, ()),
                rejections=rejections.get(n, ()),
                epochs=[{**r, "metrics": json.loads(r["metrics"])} for r in epochs.get(n, ())],
                num_epochs=epochs[n][0]["num_epochs"] if n in epochs else 0,
                gaps=gaps.get(n, ()),
                windows=windows.get(n, ()),
                kernels=_fitting(kernels, layers.get(n, ())) if _is_started(boundary) else (),
                blueprint_offsets=offsets,
            )
            for n, boundary in enumerate(self._boundaries)
        ]

    async def _lineages(self) -> list[list[Row]]:
        """The incarnations that count at each boundary, its own first, with the last lifecycle sequence of each."""
        older: RowsByBoundary = {}
        if any(b["incarnation"] > 1 for b in self._boundaries):
            older = await _by_index(self._sql.older_incarnations(self._connection, **self._before))
        own = zip(self._boundaries, self._lifecycle_sequences, strict=True)
        return [
            [{"incarnation": b["incarnation"], "lifecycle_sequence": sequence}, *older.get(n, ())]
            for n, (b, sequence) in enumerate(own)
        ]

    async def _lifecycle(self, lineages: Sequence[Sequence[Row]]) -> RowsByBoundary:
        keys = [
            (n + 1, self._boundaries[n]["run_id"], row["incarnation"], row["lifecycle_sequence"])
            for n, lineage in enumerate(lineages)
            for row in lineage
        ]
        names = ("ns", "run_ids", "incarnations", "sequences")
        columns = {name: list(column) for name, column in zip(names, zip(*keys, strict=True), strict=True)}
        return await _by_index(self._sql.lifecycle(self._connection, **columns))

    async def _windows(self, first: Sequence[int]) -> RowsByBoundary:
        sequences = [b["last_sequences"].get(TELEMETRY.name, -1) for b in self._boundaries]
        steps = {"first": list(first), "second": self._newest_windows}
        return await _by_index(self._sql.windows(self._connection, **self._incarnations, sequences=sequences, **steps))

    async def _kernels(self, layers: RowsByBoundary, offsets: Sequence[int]) -> list[Row]:
        """The kernels that fit any layer of any of the runs."""
        shapes = sorted({(r["kind"], r["num_features"]) for rows in layers.values() for r in rows})
        kinds, widths = [kind for kind, _width in shapes], [width for _kind, width in shapes]
        found = self._sql.kernels(self._connection, kinds=kinds, widths=widths, offsets=offsets)
        return [r async for r in found] if shapes else []


def _is_started(boundary: Row) -> bool:
    """Whether the start of the run precedes the boundary in the log."""
    return boundary["hyperparameters"] is not None


def _fitting(kernels: Sequence[Row], layers: Sequence[Row]) -> list[Row]:
    shapes = {(r["kind"], r["num_features"]) for r in layers}
    return [r for r in kernels if (r["target"], r["num_features"]) in shapes]


async def _by_index(rows: AsyncIterator[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    async for row in rows:
        found.setdefault(row["n"] - 1, []).append(row)
    return found


async def _blueprint_offsets(connection: Connection) -> tuple[int, ...]:
    rows = queries("views").blueprint_positions(connection)
    found = {r["log_partition"]: r["next_offset"] async for r in rows}
    return tuple(found.get(n, 0) for n in range(BLUEPRINTS.num_partitions))
