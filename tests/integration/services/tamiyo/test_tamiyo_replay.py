"""`esper tamiyo replay` on a real log: a stable digest as the log grows, missing records by name, recomputed views."""

import asyncio
import json
import random
import re
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import TopicPartition
from support.conditions import wait_until_async
from support.data.decided_runs import STEPS, Story, decided, generate_run, lay_out, recorded
from support.data.rebuild_runs import esper, live, send
from support.events.generated_logs import SimulatedTrainer, library_messages

from esper.config import Settings
from esper.graph.assembly import assemble
from esper.graph.graph_view import GraphView
from esper.oona.admin.topics import cluster_id
from esper.oona.log_reader import end_offsets, partition_of, read_range
from esper.schemas import ids
from esper.schemas.enums import Action
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import BLUEPRINTS, DECISIONS, LIFECYCLE, RUNS, TELEMETRY, VIEWS, TopicSpec
from esper.services.tamiyo.control.legal_choices import WAIT
from esper.services.tamiyo.dataset.dataset_origin import read_origin
from esper.services.tamiyo.dataset.experience_join import join_experiences
from esper.services.tamiyo.dataset.log_ranges import EARLIEST, ReplayRange
from esper.services.tamiyo.dataset.log_replay import Replay, replay
from esper.services.tamiyo.dataset.record_index import RecordIndex
from esper.services.tamiyo.settings import RentSettings
from esper.streams.database.connections import connect_pool
from esper.streams.database.stored_positions import claim_cluster
from esper.streams.read_models.view_row_reader import read_view_rows
from esper.streams.worker.batch_projection import Batch, project_batch

pytestmark = pytest.mark.slow


def messages_of(stories: Iterable[Story]) -> list[OonaMessage]:
    return [message for story in stories for messages in story.messages.values() for message in messages]


def expected_digest(stories: list[Story]) -> str:
    index, rent = RecordIndex(), RentSettings.model_validate({})
    for record in lay_out(stories, random.Random(0)):
        index.add(record)
    return join_experiences(index, rent).experiences.digest


async def read(settings: Settings, since: str = EARLIEST, until: tuple[str, ...] = (), runs: str = "*") -> Replay:
    return await replay(
        settings.need_kafka(), ReplayRange.parse([since], until, [runs]), RentSettings.model_validate({})
    )


def boundary_of(event: Any) -> int:
    """The boundary of an event of Tamiyo, or that of the decision of a report."""
    return int(event.boundary) if hasattr(event, "boundary") else int(event.step // STEPS)


async def delete_before(settings: Settings, topic: TopicSpec, partition: int, offset: int) -> None:
    """Delete records as retention or a lost disk would."""
    client = AIOKafkaAdminClient(bootstrap_servers=settings.need_kafka().bootstrap_servers)
    await client.start()
    await client.delete_records({TopicPartition(topic.name, partition): RecordsToDelete(offset)})
    await client.close()


async def test_replay_digest_is_stable_as_the_log_grows(mine: Settings, tmp_path: Path) -> None:
    stories = [generate_run(f"grow{n}", random.Random(n), 12) for n in range(3)]
    await send(mine, messages_of(stories))
    first = await read(mine, runs="grow*")
    assert len(first.joined.experiences) > 5
    assert first.joined.experiences.digest == expected_digest(stories)
    code, printed = await esper(mine, "tamiyo", "replay", "--runs", "grow*", "--into", str(tmp_path / "seen"), "-q")
    assert code == 0, printed
    assert f"digest {first.joined.experiences.digest}" in printed
    measured = first.joined.measured
    assert measured[Action.GERMINATE][0] > 0, "forks measured some germinations"
    for action, (num_rewarded, num_eligible) in measured.items():
        assert re.search(rf"{action}[^0-9\n]+{num_eligible}[^0-9\n]+{num_rewarded}\b", printed), printed
    # then another run, duplicates of everything, and a new run that matches the pattern
    await send(mine, messages_of([generate_run("other", random.Random(9), 12)]))
    await send(mine, messages_of(stories))
    await send(mine, messages_of([generate_run("grow9", random.Random(10), 12)]))
    assert (await read(mine, runs="grow[0-2]")).joined.experiences.digest == first.joined.experiences.digest
    code, printed = await esper(mine, "tamiyo", "replay", "--again", str(tmp_path / "seen"), "-q")
    assert (code, f"equal to {tmp_path / 'seen'}" in printed) == (0, True), printed
    copied = ("--again", str(tmp_path / "seen"), "--into", str(tmp_path / "copy"), "-q")
    assert (await esper(mine, "tamiyo", "replay", *copied))[0] == 0
    assert read_origin(tmp_path / "copy") == read_origin(tmp_path / "seen")
    # a folder with another range differs, and the first boundary that differs is named
    manifest = json.loads((tmp_path / "seen" / "manifest.json").read_text())
    manifest["patterns"] = ["grow[0-1]"]
    (tmp_path / "seen" / "manifest.json").write_text(json.dumps(manifest))
    code, printed = await esper(mine, "tamiyo", "replay", "--again", str(tmp_path / "seen"), "-q")
    assert code == 1
    assert "the first that is gone is grow2 incarnation 1 boundary" in printed
    code, printed = await esper(mine, "tamiyo", "replay", "--into", str(tmp_path / "seen"), "-q")
    assert code != 0
    assert "name a new folder" in printed


async def test_range_selects_decisions_by_offset_or_time(mine: Settings) -> None:
    run_id = "ranged"
    before, after = generate_run(run_id, random.Random(1), 8), generate_run(run_id, random.Random(2), 20)
    later = Story()  # the same run continues
    for topic, messages in after.messages.items():
        later.messages[topic] = [m for m in messages if boundary_of(m.data) > 8]
    await send(mine, messages_of([before]))
    now = datetime.now(UTC)
    await wait_until_async(lambda: asyncio.sleep(0, datetime.now(UTC).timestamp() > now.timestamp() + 0.05))
    place = (DECISIONS.name, partition_of(run_id, DECISIONS))
    offset = (await end_offsets(mine.need_kafka(), [DECISIONS]))[place]
    early = await read(mine, runs=run_id)
    await send(mine, messages_of([later]))
    whole = await read(mine, runs=run_id)
    assert whole.joined.num_decisions > early.joined.num_decisions
    as_of = await read(mine, until=(now.isoformat(),), runs=run_id)
    assert as_of.joined.experiences.digest == early.joined.experiences.digest
    by_time = await read(mine, since=now.isoformat(), runs=run_id)
    by_offset = await read(mine, since=f"{place[0]}[{place[1]}]@{offset}", runs=run_id)
    assert by_time.joined.experiences.digest == by_offset.joined.experiences.digest
    assert by_time.joined.num_decisions == whole.joined.num_decisions - early.joined.num_decisions
    parts = (*early.joined.experiences.stored, *by_time.joined.experiences.stored)
    assert sorted(parts, key=lambda e: e.key) == list(whole.joined.experiences.stored)
    for wrong in ("system.runs[0]@1", "yesterday", "control.tamiyo.decisions[99]@1"):
        code, printed = await esper(mine, "tamiyo", "replay", "--from", wrong, "-q")
        assert code != 0
        assert f"--from {wrong.split('@')[0]}" in printed.replace("'", "")


async def test_truncated_log_is_reported_by_partition_and_decision(mine: Settings, tmp_path: Path) -> None:
    run_id = "cut"
    story = generate_run(run_id, random.Random(5), 30)
    await send(mine, messages_of([story]))
    whole = await read(mine, runs=run_id)
    partition = partition_of(run_id, VIEWS)
    records = [r async for r in read_range(mine.need_kafka(), VIEWS, partition=partition) if r.key == b"cut"]
    code, printed = await esper(mine, "tamiyo", "replay", "--runs", run_id, "--into", str(tmp_path / "whole"), "-q")
    assert code == 0, printed
    await delete_before(mine, VIEWS, partition, records[len(records) // 2].position.offset)
    cut = await read(mine, runs=run_id)
    lost = {e.key for e in whole.joined.experiences.stored} - {e.key for e in cut.joined.experiences.stored}
    assert lost
    named = {(a.run_id, a.incarnation, a.boundary) for a in cut.exclusions if a.reason in ("no_view", "view_differs")}
    assert lost <= named, "every lost decision is named"
    code, printed = await esper(mine, "tamiyo", "replay", "--runs", run_id, "--strict", "--show", "3", "-q")
    assert code == 1
    assert f"{VIEWS.name}[{partition}] begins at offset" in printed
    assert "the log does not hold the view of the decision" in printed
    assert f"{run_id} incarnation 1 boundary 1: no_view" in printed
    code, _printed = await esper(mine, "tamiyo", "replay", "--runs", run_id, "-q")
    assert code == 0, "only --strict makes it a failure"
    code, printed = await esper(mine, "tamiyo", "replay", "--again", str(tmp_path / "whole"), "-q")
    assert code == 1
    assert f"{VIEWS.name}[{partition}] begins at offset" in printed
    assert "the first that is gone is cut incarnation 1" in printed


# recomputed views


async def project_everything(settings: Settings) -> None:
    """Project the log from its start, as a worker does."""
    kafka = settings.need_kafka()
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        await claim_cluster(connection, await cluster_id(kafka), kafka)
        for topic in (BLUEPRINTS, RUNS, LIFECYCLE, TELEMETRY):
            found: dict[int, list[Any]] = {}
            async for record in read_range(kafka, topic):
                found.setdefault(record.position.partition, []).append(record)
            for partition, records in found.items():
                await project_batch(connection, Batch(topic.name, partition, 0, tuple(records)))


async def trained_run(settings: Settings, run_id: str, seed: int) -> list[GraphView]:
    """Project a run with telemetry; return its views as read from the live rows."""
    messages: list[OonaMessage] = []
    trainer = SimulatedTrainer(run_id, random.Random(seed), messages.append)
    trainer.start()
    for _n in range(9):
        trainer.train(20)
        trainer.end_epoch()
    await send(settings, [*library_messages(random.Random(seed)), *messages])
    await project_everything(settings)
    async with live(settings) as connection:
        keys = [key for key in trainer.states_at_boundaries if key[0] == run_id]
        return [assemble(await read_view_rows(connection, *key)) for key in keys]


async def decide(settings: Settings, views: list[GraphView]) -> None:
    messages = []
    for view in views:
        key = (view.run_id, view.incarnation, view.boundary)
        messages.append(OonaMessage.of(recorded(view), id=ids.view_id(*key), source="test"))
        messages.append(OonaMessage.of(decided(view, WAIT, 0.9), id=ids.decision_id(*key), source="test"))
    await send(settings, messages)


@pytest.mark.timeout(240)
async def test_views_are_recomputed_from_telemetry_while_it_lasts(mine: Settings) -> None:
    run_id = "measured"
    *views, last = await trained_run(mine, run_id, seed=3)
    assert sum(view.window_step is not None for view in views) > 5
    await decide(mine, views)
    code, printed = await esper(mine, "tamiyo", "replay", "--runs", run_id, "--verify", "-q")
    assert code == 0, printed
    assert f"{len(views)} of {len(views)} views are reproduced from the log, byte for byte" in printed
    # a view that the log cannot give
    forged = replace(last, layers=tuple(replace(layer, num_signals=77) for layer in last.layers))
    await decide(mine, [forged])
    code, printed = await esper(mine, "tamiyo", "replay", "--runs", run_id, "--verify", "-q")
    assert code == 1
    assert f"1 differ though the log is whole; the first is {run_id} incarnation 1 boundary {last.boundary}" in printed
    assert f"the log gives {last.digest[:16]}" in printed
    # telemetry of the first half expires: these views cannot be verified, the later ones can
    partition = partition_of(run_id, TELEMETRY)
    records = [r async for r in read_range(mine.need_kafka(), TELEMETRY, partition=partition) if r.key == b"measured"]
    await delete_before(mine, TELEMETRY, partition, records[len(records) // 2].position.offset)
    code, printed = await esper(mine, "tamiyo", "replay", "--runs", run_id, "--verify", "-q")
    assert code == 1
    assert "cannot be reproduced: their telemetry has expired (the first is measured incarnation 1 boundary" in printed
    assert f"1 differ though the log is whole; the first is {run_id} incarnation 1 boundary {last.boundary}" in printed
    num_recomputed = int(re.search(r"([0-9]+) of [0-9]+ views are reproduced", printed)[1])  # type: ignore[index]
    assert 2 < num_recomputed < len(views), "the later ones, and those from before the first window"
