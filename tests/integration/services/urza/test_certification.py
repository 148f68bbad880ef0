"""Blueprints on the real stack: proposed, examined, certified or rejected, retired; also while an Urza is killed."""

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer
from support.conditions import wait_until, wait_until_async
from support.processes.esper_processes import SCRIPTS, cli, log_of, process, running, worker

from esper.embedded.stack import EmbeddedStack
from esper.errors import ConflictError, ContractError
from esper.oona.log_reader import partition_of, read_range
from esper.schemas import events, ids
from esper.schemas.assets import BlueprintSpec, LayerNode
from esper.schemas.enums import BlueprintChange
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import BLUEPRINTS
from esper.services.urza import library_queries
from esper.services.urza.blueprint_changes import ChangeOutcome
from esper.services.urza.kernels.shipped_blueprints import SHIPPED
from esper.services.urza.urza_service import Urza, open_urza
from esper.streams.database.sql_queries import queries

DEADLINE_S = 90.0
HUGE_WIDTH = 2**31 - 1
PROPOSED = """
{good}: {{module: low_rank, parameters: {{rank: 2}}, targets: [linear, conv1d], description: thin}}
{wrong}: {{module: low_rank, parameters: {{rank: 2000}}, targets: [linear]}}
{unknown}: {{module: exec, parameters: {{}}, targets: [linear]}}
"""

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def stack(log: EmbeddedStack) -> EmbeddedStack:
    """A stack of this module alone: on a shared one other tests certify blueprints without a certificate."""
    return log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def urza(stack: EmbeddedStack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Urza]:
    """A worker and an Urza whose catalogue is complete."""
    with running(worker(stack, tmp_path_factory.mktemp("urza")), "worker.ready"):
        async with open_urza(stack.settings()) as opened:

            async def is_ready() -> bool:
                return opened.is_ready

            await wait_until_async(is_ready, DEADLINE_S, "Urza's readiness")
            yield opened


def named(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:8]}"


async def status_of(urza: Urza, blueprint_id: str) -> str | None:
    rows = await library_queries.versions(urza.reader, [blueprint_id])
    return rows[0]["status"] if rows else None


async def wait_until_status(urza: Urza, blueprint_id: str, *wanted: str) -> str:
    async def is_it() -> str | None:
        found = await status_of(urza, blueprint_id)
        return found if found in wanted else None

    return str(await wait_until_async(is_it, DEADLINE_S, f"{blueprint_id} becoming {' or '.join(wanted)}"))


def proposal(blueprint_id: str, spec: BlueprintSpec, version: int = 0) -> events.BlueprintChangeRequested:
    return events.BlueprintChangeRequested(
        blueprint_id=blueprint_id, change="propose", expected_version=version, spec=spec
    )


async def request(urza: Urza, *changes: events.BlueprintChangeRequested, key: str | None = None) -> list[ChangeOutcome]:
    return await urza.changes.request(changes, key=key or uuid.uuid4().hex, source="test", timeout_s=DEADLINE_S)


async def lineage(urza: Urza, blueprint_id: str) -> library_queries.Lineage:
    found = await library_queries.lineage(urza.reader, blueprint_id)
    assert found is not None
    return found


async def started(urza: Urza, *widths: int) -> str:
    """A run with a linear layer of each width."""
    run_id = named("wants")
    layers = tuple(
        LayerNode(layer_id=f"fc{n}", kind="linear", num_features=n, num_parameters=n, num_seeds=1) for n in widths
    )
    event = events.RunStarted(
        run_id=run_id, incarnation=1, sequence=0, step=0, model="N", layers=layers, edges=(), boundary_steps=5,
        command_offset=0,
    )  # fmt: skip
    await urza.producer.send(OonaMessage.of(event, id=ids.trainer_event_id(run_id, 1, 0), source="test"))
    return run_id


async def offered_to(urza: Urza, run_id: str) -> list[dict[str, Any]]:
    """The kernels that Tamiyo may choose from, by all that the log says now."""
    everything = [2**62] * BLUEPRINTS.num_partitions
    layers = await layers_of(urza, run_id)
    kinds, widths = [r["kind"] for r in layers], [r["num_features"] for r in layers]
    return await urza.reader.all("kernels", sql_file="views", kinds=kinds, widths=widths, offsets=everything)


async def layers_of(urza: Urza, run_id: str) -> list[dict[str, Any]]:
    return await urza.reader.all("layers_of", run_id=run_id, after_ordinal=-1, after_layer="", limit=100)


async def test_blueprint_is_certified_step_by_step(stack: EmbeddedStack, urza: Urza) -> None:
    blueprint_id = named("good")
    (outcome,) = await request(urza, proposal(blueprint_id, SHIPPED["bottleneck-2x"]))
    assert (outcome.verdict, outcome.version_after) == ("accepted", 1)
    assert await wait_until_status(urza, blueprint_id, "certified", "rejected") == "certified"
    found = await lineage(urza, blueprint_id)
    assert [(c["change"], c["verdict"]) for c in found.changes] == [
        ("propose", "accepted"),
        ("compile", "accepted"),
        ("certify", "accepted"),
    ]
    (certificate,) = found.certificates
    causes = [c["causation_id"] for c in found.changes]
    assert causes == [None, found.changes[0]["event_id"], certificate["event_id"]]
    assert certificate["blueprint_version"] == 2
    measured = {(m["target"], m["num_features"]): m for m in certificate["measurements"]}
    assert set(measured) == {(kind, width) for kind in ("linear", "conv2d") for width in (16, 64)}
    assert measured["linear", 64]["num_parameters"] == 2 * 64 * 128 + 128 + 64
    records = read_range(stack.settings().need_kafka(), BLUEPRINTS, partition=partition_of(blueprint_id, BLUEPRINTS))
    messages = [r.decode() async for r in records if r.key == blueprint_id.encode()]
    written = {c["event_id"] for c in (*found.changes, certificate, *found.kernels)}
    refused = {m.id for m in messages if isinstance(m.data, events.KernelRefused)}  # for a layer that another test has
    assert {m.id for m in messages} - refused == written


async def test_command_line_requests_many_changes_at_once(stack: EmbeddedStack, urza: Urza, tmp_path: Path) -> None:
    good, wrong, unknown = named("good"), named("wrong"), named("unknown")
    file = tmp_path / "mine.yaml"
    file.write_text(PROPOSED.format(good=good, wrong=wrong, unknown=unknown))

    async def esper(*arguments: str) -> tuple[int, str]:
        return await asyncio.to_thread(cli, stack, tmp_path, "blueprints", *arguments, COLUMNS="250")

    code, printed = await esper("propose", str(file), "--wait")
    assert code == 1, "two of them were rejected"
    assert f"{good} is certified" in printed
    assert f"{wrong} is rejected" in printed
    code, printed = await esper("show", wrong)
    assert "it cannot be built: low_rank: rank must be a whole number in 1..1024, not 2000" in printed
    assert "no module 'exec' in the catalogue" in (await lineage(urza, unknown)).changes[-1]["reason"]
    code, printed = await esper("show", good)
    assert code == 0
    assert "Certificate of version 2: identity, shapes, cost, gradient_flow, extremes, round_trip" in printed
    code, printed = await esper("retire", good, wrong)
    assert code == 1
    assert "accepted" in printed
    assert "not_allowed" in printed, "what was rejected cannot be retired"
    code, printed = await esper("list", "--status", "retired")
    assert good in printed
    assert wrong not in printed


async def test_repeated_key_keeps_its_verdicts(urza: Urza) -> None:
    one, other = named("twice"), named("twice")
    requested = [proposal(one, SHIPPED["noop"]), proposal(other, SHIPPED["noop"], 7)]
    first = await request(urza, *requested, key=one)
    assert [o.verdict for o in first] == ["accepted", "wrong_version"]
    await wait_until_status(urza, one, "certified")
    assert await request(urza, *requested, key=one) == first


async def test_rejected_blueprint_can_be_proposed_again(urza: Urza) -> None:
    blueprint_id = named("mended")
    await request(
        urza, proposal(blueprint_id, BlueprintSpec(module="mlp", parameters={"width": -1}, targets=("linear",)))
    )
    await wait_until_status(urza, blueprint_id, "rejected")
    good = BlueprintSpec(module="mlp", parameters={"width": 8}, targets=("linear",))
    (stale, fresh) = await request(urza, proposal(blueprint_id, good, 0), proposal(blueprint_id, good, 2))
    assert (stale.verdict, fresh.verdict) == ("wrong_version", "accepted")
    await wait_until_status(urza, blueprint_id, "certified")


async def test_retired_blueprint_is_not_offered_and_keeps_kernels(urza: Urza) -> None:
    blueprint_id, width = named("old"), 37
    await request(urza, proposal(blueprint_id, SHIPPED["affine"]))
    await wait_until_status(urza, blueprint_id, "certified")
    run_id = await started(urza, width)

    async def offered() -> set[str]:
        return {k["blueprint_id"] for k in await offered_to(urza, run_id)}

    async def is_kernel_offered() -> bool:
        return blueprint_id in await offered()

    await wait_until_async(is_kernel_offered, DEADLINE_S, "its kernel")
    wanted = await urza.changes.same_change(BlueprintChange.RETIRE, [blueprint_id], key=blueprint_id, reason="done")
    (outcome,) = await request(urza, *wanted, key=blueprint_id)
    assert outcome.verdict == "accepted"
    assert blueprint_id not in await offered()
    found = await lineage(urza, blueprint_id)
    assert [k["num_features"] for k in found.kernels].count(width) == 1
    assert await urza.blobs.exists(found.kernels[0]["kernel_sha256"])
    with pytest.raises(ContractError, match="blueprint missing does not exist"):
        await urza.changes.same_change(BlueprintChange.RETIRE, ["missing"], key="k", reason="")
    again = await urza.changes.same_change(BlueprintChange.RETIRE, [blueprint_id], key=blueprint_id, reason="done")
    assert again == wanted, "under its key it names the version that it named first"
    assert await request(urza, *again, key=blueprint_id) == [outcome]
    with pytest.raises(ConflictError, match="another request"):
        await request(urza, proposal(blueprint_id, SHIPPED["norm"], 9), key=blueprint_id)


async def test_kernels_are_built_or_refused_for_every_width(urza: Urza) -> None:
    narrow = named("narrow")
    await request(urza, proposal(narrow, SHIPPED["low-rank-4"]))
    await wait_until_status(urza, narrow, "certified")
    run_id = await started(urza, 5, 6, 7, HUGE_WIDTH)

    async def is_complete() -> bool:
        is_known = bool(await layers_of(urza, run_id))  # in this order: the run may be projected in between
        left = await library_queries.wanted_kernels(urza.reader, limit=1000)
        return is_known and not left

    await wait_until_async(is_complete, DEADLINE_S, "every kernel")
    shipped = {i for i, spec in SHIPPED.items() if "linear" in spec.targets}
    linear = {narrow} | {i for i in shipped if await status_of(urza, i) == "certified"}
    assert len(linear) >= len(shipped), "the test of the API's examples retires one at most"
    offered = await offered_to(urza, run_id)
    small = Counter(k["blueprint_id"] for k in offered if k["num_features"] < 10 and k["blueprint_id"] in linear)
    assert small == dict.fromkeys(linear, 3)
    refused = (await lineage(urza, narrow)).refusals
    assert [r["num_features"] for r in refused] == [HUGE_WIDTH]
    assert "more than 50000000" in refused[0]["reason"]


async def test_foreign_records_do_not_stop_the_loop(stack: EmbeddedStack, urza: Urza) -> None:
    wild = named("wild")
    spec = BlueprintSpec(
        module="mlp", parameters={f"o{n}": 10.0**300 for n in range(5000)}, targets=("linear",) * 900,
        description="[/] \u2028 " * 80,
    )  # fmt: skip
    producer = AIOKafkaProducer(bootstrap_servers=stack.kafka.bootstrap_servers)
    await producer.start()
    try:
        headers = [("ce_type", b"esper.certificate.issued.v1"), ("ce_id", b"?")]
        for value in (b"\x00", b"{}", json.dumps({"type": "esper.kernel.refused.v1"}).encode()):
            for partition in range(BLUEPRINTS.num_partitions):
                await producer.send_and_wait(
                    BLUEPRINTS.name, value, key=wild.encode(), partition=partition, headers=headers
                )
    finally:
        await producer.stop()
    after = named("after")
    await request(urza, proposal(wild, spec), proposal(after, SHIPPED["norm"]))
    await wait_until_status(urza, wild, "rejected")
    await wait_until_status(urza, after, "certified")
    assert urza.is_ready


async def test_two_urzas_with_one_killed_certify_each_once(stack: EmbeddedStack, urza: Urza, tmp_path: Path) -> None:
    esper = str(SCRIPTS / "esper")
    victim = process(stack, tmp_path, "victim", esper, "serve", "urza")
    mine = [named("shared") for _n in range(12)]
    with running(victim, "urza.ready"):
        await asyncio.to_thread(wait_until, lambda: "catalogue.completed" in log_of(victim), DEADLINE_S, "the victim")
        await request(urza, *(proposal(i, SHIPPED[n]) for i, n in zip(mine, SHIPPED, strict=False)))
        await asyncio.to_thread(
            wait_until, lambda: sum(i in log_of(victim) for i in mine) >= 2, DEADLINE_S, "its first answers"
        )
        children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
        victim.kill()
        for child in children:
            wait_until(lambda child=child: not Path(f"/proc/{child}").exists(), 20, "the end of its sandbox")
    for blueprint_id in mine:
        await wait_until_status(urza, blueprint_id, "certified")
    for blueprint_id in mine:
        found = await lineage(urza, blueprint_id)
        accepted = [c["change"] for c in found.changes if c["verdict"] == "accepted"]
        assert accepted == ["propose", "compile", "certify"]
        assert len(found.changes) == 3, "both requested the same changes, by the same ids"
        assert len(found.certificates) == 1


async def test_frequent_queries_use_indexes(stack: EmbeddedStack, urza: Urza) -> None:
    connection = await asyncpg.connect(stack.postgres.dsn, server_settings={"search_path": "esper"})
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            "INSERT INTO layers SELECT 'many-' || n, 'fc', 0, 'linear', 1 + n % 50, 9, 1 FROM generate_series(1, 50000) n"
        )
        await connection.execute("ANALYZE layers")
        plans = {"wanted_kernels": await plan_of(connection, "wanted_kernels", 1000)}
        await connection.execute("SET LOCAL enable_seqscan = off")  # the other tables are small here
        plans["not_validated"] = await plan_of(connection, "not_validated", [], [], 50)
        plans["kernels"] = await plan_of(connection, "kernels", "affine")
        await transaction.rollback()
    finally:
        await connection.close()
    assert plans["wanted_kernels"].count("layers_by_width") == 2
    assert "Seq Scan on layers" not in plans["wanted_kernels"]
    assert "blueprints_not_validated" in plans["not_validated"]
    assert "kernels_in_order" in plans["kernels"]


async def plan_of(connection: asyncpg.Connection, name: str, *values: object) -> str:
    rows = await connection.fetch(f"EXPLAIN {getattr(queries('library'), name).sql}", *values)
    return "\n".join(r[0] for r in rows)


async def test_projections_match_the_log(stack: EmbeddedStack, urza: Urza, tmp_path: Path) -> None:
    code, printed = await asyncio.to_thread(cli, stack, tmp_path, "projections", "verify")
    assert code == 0, printed
