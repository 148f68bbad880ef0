"""A view depends only on its boundary and on the offsets of innovation.blueprints that it names."""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.data.reference_health_windows import HealthWindow
from support.events.generated_logs import BoundaryKey, GeneratedLog, generate_log

from esper.config import PostgresSettings
from esper.graph.assembly import assemble
from esper.graph.graph_view import GraphView
from esper.oona.records import TopicPartition
from esper.streams.read_models.pending_boundaries import is_complete, pending_boundaries
from esper.streams.read_models.view_row_reader import read_many_view_rows, read_view_rows
from esper.streams.worker.batch_projection import Batch, project_batch
from esper.streams.worker.partition_cache import PartitionCache

EXAMPLES = int(os.environ.get("VIEW_EXAMPLES", "10"))
SCRIPTS = st.lists(
    st.lists(st.sampled_from(("train", "train", "train", "epoch", "gap", "save", "resume")), min_size=1, max_size=9),
    min_size=1,
    max_size=2,
)

Read = tuple[tuple[int, ...], bytes]
"""The offsets of innovation.blueprints that a view names, and its bytes."""


@asynccontextmanager
async def rolled_back(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Roll back every write."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


async def view_of(connection: Any, key: BoundaryKey, offsets: Sequence[int] | None = None) -> GraphView:
    return assemble(await read_view_rows(connection, *key, blueprint_offsets=offsets))


class Reader:
    """Projects a log in one of the ways that workers may, and reads views as soon as they are complete."""

    def __init__(self, connection: asyncpg.Connection, log: GeneratedLog, rng: random.Random) -> None:
        self.views: dict[BoundaryKey, Read] = {}
        self._connection, self._log, self._rng = connection, log, rng
        self._next = dict.fromkeys(log.partitions, 0)
        self._caches: dict[TopicPartition, PartitionCache] = {}
        self._sizes = rng.choice(((1,), (1, 2, 5), (50,), (1, 3, 200)))

    async def project_all(self, boundaries: list[BoundaryKey]) -> None:
        """Project to the end of the log."""
        while unread := [p for p, n in self._next.items() if n < len(self._log.partitions[p])]:
            await self._project_some(self._rng.choice(unread))
            await self._read_complete_views(boundaries)

    async def _project_some(self, tp: TopicPartition) -> None:
        if self._rng.random() < 0.1:  # a restart, or another worker
            self._caches.clear()
        begin = max(0, self._next[tp] - self._rng.choice((0, 0, 0, 3)))  # a stale fetch reads some again
        records = self._log.partitions[tp][begin : begin + self._rng.choice(self._sizes) + self._next[tp] - begin]
        start = self._log.partitions[tp][begin - 1].position.offset + 1 if begin else 0
        cache = self._caches.setdefault(tp, PartitionCache())
        await project_batch(self._connection, Batch(*tp, start, tuple(records)), cache=cache)
        self._next[tp] = begin + len(records)

    async def _read_complete_views(self, boundaries: list[BoundaryKey]) -> None:
        for key in boundaries:
            if key not in self.views and await is_complete(self._connection, *key):
                view = await view_of(self._connection, key)
                self.views[key] = (view.blueprint_offsets, view.to_bytes())
        for pending in await pending_boundaries(self._connection):
            key = (pending.run_id, pending.incarnation, pending.boundary)
            assert pending.is_complete == (key in self.views) or key not in boundaries


def difference(before: bytes, after: bytes) -> dict[str, Any]:
    """The columns that differ between two views."""
    old, new = json.loads(before), json.loads(after)
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


async def read_again(connection: Any, views: dict[BoundaryKey, Read]) -> dict[BoundaryKey, Read]:
    """The same boundaries at the same offsets, as the tables show them now, all of one offset read together."""
    by_offsets: dict[tuple[int, ...], list[BoundaryKey]] = {}
    for key, (offsets, _data) in views.items():
        by_offsets.setdefault(offsets, []).append(key)
    again: dict[BoundaryKey, Read] = {}
    for offsets, keys in by_offsets.items():
        unknown = ("unknown-run", 1, 1)
        *found, missing = await read_many_view_rows(connection, [*keys, unknown], offsets)
        assert missing is None
        for key, rows in zip(keys, found, strict=True):
            assert rows is not None
            again[key] = (offsets, assemble(rows).to_bytes())
    return again


@contextmanager
def projection_connection(postgres: PostgresSettings) -> Iterator[tuple[asyncio.Runner, asyncpg.Connection]]:
    with asyncio.Runner() as runner:
        path = {"search_path": postgres.schema_name}
        connection = runner.run(asyncpg.connect(postgres.dsn.get_secret_value(), server_settings=path))
        try:
            yield runner, connection
        finally:
            runner.run(connection.close())


@pytest.mark.timeout(60 + 20 * EXAMPLES)
def test_view_bytes_do_not_depend_on_how_log_was_projected(own_database: PostgresSettings) -> None:
    with projection_connection(own_database) as (runner, connection):

        @given(
            seed=st.integers(0, 2**32),
            scripts=SCRIPTS,
            share_broken=st.sampled_from((0.0, 0.1)),
            share_resent=st.sampled_from((0.0, 0.1)),
        )
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[p for p in Phase if p is not Phase.shrink or EXAMPLES > 50],
            print_blob=True,
        )
        def same_bytes(seed: int, scripts: list[list[str]], share_broken: float, share_resent: float) -> None:
            log, known = generate_log(seed, scripts, share_broken, share_resent)
            runner.run(compare_projections(connection, log, known, random.Random(seed)))

        same_bytes()


async def compare_projections(
    connection: asyncpg.Connection, log: GeneratedLog, known: dict[BoundaryKey, Any], rng: random.Random
) -> None:
    """Project in two ways: views read first, read again at the end, and read by the other way must be equal."""
    boundaries = list(known)
    seen: list[dict[BoundaryKey, Read]] = []
    for _way in range(2):
        async with rolled_back(connection):
            reader = Reader(connection, log, rng)
            await reader.project_all(boundaries)
            seen.append(reader.views)
            for views in seen:
                again = await read_again(connection, views)
                changed = [difference(views[key][1], again[key][1]) for key in views if again[key] != views[key]]
                assert not changed, "a view must not change after it was read"
            if not log.has_undecodable:
                assert reader.views.keys() == known.keys(), "nothing is missing, so every boundary is complete"
                for key, (_offsets, data) in reader.views.items():
                    assert_agrees(GraphView.from_bytes(data), *known[key])
    assert seen[0].keys() == seen[1].keys()


def assert_agrees(
    view: GraphView,
    seeds: dict[tuple[str, int], Any],
    epochs: tuple[tuple[int, int], ...],
    health: dict[tuple[str, int], HealthWindow],
) -> None:
    """Check a view against the trainer's state at the boundary."""
    shown = {
        (s.layer_id, s.seed_id): (
            s.stage, s.since_step, s.blueprint_id, s.germinated_at_step, s.num_germinations, s.num_given_up, s.breaker,
        )
        for s in view.seeds
    }  # fmt: skip
    assert shown == {key: tuple(vars(seed).values()) for key, seed in seeds.items()}
    assert [(e.epoch, e.step) for e in view.epochs] == list(epochs)
    assert view.num_epochs == len(epochs)
    assert {(s.layer_id, s.seed_id): s.num_signals for s in view.seeds} == {k: w.num_signals for k, w in health.items()}
    assert {(s.layer_id, s.seed_id): s.health for s in view.seeds} == {k: w.means for k, w in health.items()}
