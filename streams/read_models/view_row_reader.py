"""The rows that views are made of: of one boundary, or of many with as many questions as of one.

Invariant: all rows of one call are of one snapshot, since it is made inside a REPEATABLE READ transaction; and a
boundary's rows are the same whichever others are read with it.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from esper.errors import UnavailableError
from esper.graph.features import MAX_EPOCHS, RECENT_STEPS
from esper.graph.health_windows import WINDOW_STEPS, last_complete_window
from esper.graph.view_rows import Row, ViewRows
from esper.schemas.topics import BLUEPRINTS, LIFECYCLE, TELEMETRY
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries

BoundaryName = tuple[str, int, int]
"""(run, incarnation, boundary)."""

Numbered = Mapping[int, Sequence[Row]]
"""Boundary's number, as of ``enumerate`` -> its rows of one table."""


async def read_view_rows(
    connection: Connection, run_id: str, incarnation: int, boundary: int, blueprint_offsets: Sequence[int] | None = None
) -> ViewRows:
    """The rows of one boundary's view. Call it inside a REPEATABLE READ transaction.

    The same boundary and offsets give the same view, whenever it is read, once the boundary is complete.

    Args:
        blueprint_offsets: how far each partition of innovation.blueprints counts, to see a view again
            as it was; as far as it is folded where none are given.

    Raises:
        UnavailableError: the boundary is not folded (yet).
    """
    (found,) = await read_many_view_rows(connection, [(run_id, incarnation, boundary)], blueprint_offsets)
    if found is None:
        raise UnavailableError(f"boundary {boundary} of {run_id}, incarnation {incarnation}, is not folded yet")
    return found


async def read_many_view_rows(
    connection: Connection, names: Sequence[BoundaryName], blueprint_offsets: Sequence[int] | None = None
) -> list[ViewRows | None]:
    """The rows of many views, in their order, as ``read_view_rows``; None where a boundary is not folded (yet)."""
    at_of = await boundary_rows(connection, names)
    if not at_of:
        return [None] * len(names)
    offsets = await _blueprint_offsets(connection) if blueprint_offsets is None else tuple(blueprint_offsets)
    numbers, ats = list(at_of), list(at_of.values())
    parts = await _Reader(connection, ats).read(offsets)
    found = dict(zip(numbers, parts, strict=True))
    return [found.get(n) for n in range(len(names))]


async def boundary_rows(connection: Connection, names: Sequence[BoundaryName]) -> dict[int, dict[str, Any]]:
    """Place in ``names`` -> the boundary's own row, where it is folded."""
    run_ids, incarnations, boundaries = (list(column) for column in zip(*names, strict=True))
    rows = queries("views").boundaries(connection, run_ids=run_ids, incarnations=incarnations, boundaries=boundaries)
    return {r["n"] - 1: {**r, "last_sequences": json.loads(r["last_sequences"])} async for r in rows}


class _Reader:
    """Asks for the rows of some boundaries, a table at a time."""

    def __init__(self, connection: Connection, ats: Sequence[Row]) -> None:
        self._connection, self._ats, self._sql = connection, ats, queries("views")
        self._told = [at["last_sequences"].get(LIFECYCLE.name, -1) for at in ats]
        self._window = [last_complete_window(at["step"]) for at in ats]
        self._run = {"run_ids": [at["run_id"] for at in ats]}
        self._mine = {**self._run, "incarnations": [at["incarnation"] for at in ats]}
        self._before = {**self._mine, "log_offsets": [at["log_offset"] for at in ats]}

    async def read(self, offsets: tuple[int, ...]) -> list[ViewRows]:
        sql, connection = self._sql, self._connection
        told = {**self._mine, "sequences": self._told}
        lines = await self._lines()
        layers = await _by_number(sql.layers(connection, **self._run))
        edges = await _by_number(sql.edges(connection, **self._run))
        lifecycle = await self._lifecycle(lines)
        breakers = await _by_number(sql.breakers(connection, **told))
        after = [at["step"] - RECENT_STEPS for at in self._ats]
        rejections = await _by_number(sql.rejections(connection, **told, after_steps=after))
        epochs = await _by_number(sql.epochs(connection, **self._before, max_epochs=MAX_EPOCHS))
        first = [window - WINDOW_STEPS for window in self._window]
        gaps = await _by_number(sql.gaps(connection, **self._before, from_steps=first))
        windows = await self._windows(first)
        kernels = await self._kernels(layers, offsets)
        return [
            ViewRows(
                boundary={
                    **at,
                    "hyperparameters": json.loads(at["hyperparameters"] or "{}"),
                    "from_step": at["from_step"] or 0,
                },
                layers=layers.get(n, ()) if _is_started(at) else (),
                edges=edges.get(n, ()) if _is_started(at) else (),
                line=lines[n],
                resumed_seeds=json.loads(at["seeds"] or "[]"),
                lifecycle=lifecycle.get(n, ()),
                breakers=breakers.get(n, ()),
                rejections=rejections.get(n, ()),
                epochs=[{**r, "metrics": json.loads(r["metrics"])} for r in epochs.get(n, ())],
                num_epochs=epochs[n][0]["num_epochs"] if n in epochs else 0,
                gaps=gaps.get(n, ()),
                windows=windows.get(n, ()),
                kernels=_fitting(kernels, layers.get(n, ())) if _is_started(at) else (),
                blueprint_offsets=offsets,
            )
            for n, at in enumerate(self._ats)
        ]

    async def _lines(self) -> list[list[Row]]:
        """The live line of each: its own incarnation, and what counts of those before it."""
        older: Numbered = {}
        if any(at["incarnation"] > 1 for at in self._ats):
            older = await _by_number(self._sql.older_lines(self._connection, **self._before))
        own = [{"incarnation": at["incarnation"], "lifecycle_sequence": n} for at, n in self._own()]
        return [[one, *older.get(n, ())] for n, one in enumerate(own)]

    def _own(self) -> list[tuple[Row, int]]:
        return list(zip(self._ats, self._told, strict=True))

    async def _lifecycle(self, lines: Sequence[Sequence[Row]]) -> Numbered:
        parts = [(n + 1, self._ats[n]["run_id"], r["incarnation"], r["lifecycle_sequence"])
                 for n, line in enumerate(lines) for r in line]  # fmt: skip
        ns, run_ids, incarnations, sequences = (list(column) for column in zip(*parts, strict=True))
        asked = {"ns": ns, "run_ids": run_ids, "incarnations": incarnations, "sequences": sequences}
        return await _by_number(self._sql.lifecycle(self._connection, **asked))

    async def _windows(self, first: Sequence[int]) -> Numbered:
        told = [at["last_sequences"].get(TELEMETRY.name, -1) for at in self._ats]
        steps = {"first": list(first), "second": self._window}
        return await _by_number(self._sql.windows(self._connection, **self._mine, sequences=told, **steps))

    async def _kernels(self, layers: Numbered, offsets: Sequence[int]) -> list[Row]:
        """Those that fit any layer of any of the runs."""
        shapes = sorted({(r["kind"], r["num_features"]) for rows in layers.values() for r in rows})
        kinds, widths = [kind for kind, _width in shapes], [width for _kind, width in shapes]
        found = self._sql.kernels(self._connection, kinds=kinds, widths=widths, offsets=offsets)
        return [r async for r in found] if shapes else []


def _is_started(at: Row) -> bool:
    """Whether the run's own start lies before the boundary."""
    return at["hyperparameters"] is not None


def _fitting(kernels: Sequence[Row], layers: Sequence[Row]) -> list[Row]:
    shapes = {(r["kind"], r["num_features"]) for r in layers}
    return [r for r in kernels if (r["target"], r["num_features"]) in shapes]


async def _by_number(rows: AsyncIterator[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    async for row in rows:
        found.setdefault(row["n"] - 1, []).append(row)
    return found


async def _blueprint_offsets(connection: Connection) -> tuple[int, ...]:
    rows = queries("views").blueprint_positions(connection)
    found = {r["log_partition"]: r["next_offset"] async for r in rows}
    return tuple(found.get(n, 0) for n in range(BLUEPRINTS.num_partitions))
