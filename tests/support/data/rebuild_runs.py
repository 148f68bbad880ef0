"""Runs for the tests of `esper projections`: messages, projection of new records, and comparison."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from support.events.tamiyo_run_events import trainer_message
from typer.testing import CliRunner

from esper.cli.app import app
from esper.config import Settings
from esper.oona.admin.topics import cluster_id
from esper.oona.log_reader import beginning_offsets, read_range
from esper.oona.producer import OonaProducer
from esper.schemas import events
from esper.schemas.assets import LayerNode
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.topics import RUNS, TELEMETRY, TOPICS
from esper.streams.database.connections import connect, connect_pool
from esper.streams.database.stored_positions import claim_cluster, stored_positions
from esper.streams.replay import verify
from esper.streams.worker.batch_projection import Batch, project_batch

LAYER = LayerNode(layer_id="fc1", kind="linear", num_features=8, num_parameters=72, num_seeds=1)


def started(run_id: str) -> OonaMessage:
    return trainer_message(run_id, 0, events.RunStarted, step=0, model="Net", layers=(LAYER,), edges=(), boundary_steps=9,
                command_offset=0)  # fmt: skip


def epochs(run_id: str, numbers: range) -> list[OonaMessage]:
    """Epoch n has sequence n: so the highest sequence says how many rows there must be."""
    return [
        trainer_message(run_id, n, events.EpochCompleted, step=n, epoch=n, metrics={"val_accuracy": n / 1000})
        for n in numbers
    ]


def health(run_id: str, steps: range) -> list[OonaMessage]:
    signal = HealthSignal(layer_id="fc1", seed_id=0, chunk_id=0, epoch=0, health_score=0.5, activation_mean=0.25)
    return [
        trainer_message(run_id, n, events.LayerHealthMeasured, step=n, epoch=0, layer_id="fc1", signals=(signal,))
        for n in steps
    ]


async def send(settings: Settings, messages: list[OonaMessage]) -> None:
    async with OonaProducer(settings.need_kafka()) as producer:
        await producer.send_batch(messages)


async def project_new_records(settings: Settings) -> None:
    """Project what is new in the log into the live rows."""
    kafka = settings.need_kafka()
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        await claim_cluster(connection, await cluster_id(kafka), kafka)
        stored, first = await stored_positions(connection), await beginning_offsets(kafka, TOPICS)
        for topic in (TELEMETRY, RUNS):
            starts = {n: stored.get((topic.name, n), first[topic.name, n]) for n in range(topic.num_partitions)}
            found: dict[int, list[Any]] = {}
            async for record in read_range(kafka, topic, start=starts):
                found.setdefault(record.position.partition, []).append(record)
            for partition, records in found.items():
                await project_batch(connection, Batch(topic.name, partition, starts[partition], tuple(records)))


@asynccontextmanager
async def live(settings: Settings) -> AsyncIterator[Any]:
    connection = await connect(settings.need_postgres(), settings.need_postgres().schema_name)
    try:
        yield connection
    finally:
        await connection.close()


async def different(settings: Settings) -> list[str]:
    return [c.table for c in await verify(settings) if not c.is_equal]


async def esper(settings: Settings, *arguments: str) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and output."""
    env = {
        "ESPER_KAFKA__BOOTSTRAP_SERVERS": settings.need_kafka().bootstrap_servers,
        "ESPER_POSTGRES__DSN": settings.need_postgres().dsn.get_secret_value(),
        "COLUMNS": "200",
    }
    if settings.s3 is not None:
        s3 = settings.s3
        env |= {
            "ESPER_S3__ENDPOINT_URL": s3.endpoint_url,
            "ESPER_S3__ACCESS_KEY": s3.access_key.get_secret_value(),
            "ESPER_S3__SECRET_KEY": s3.secret_key.get_secret_value(),
        }
    result = await asyncio.to_thread(CliRunner(env=env).invoke, app, list(arguments))
    shown = f"{result.exception}" if result.exception and not isinstance(result.exception, SystemExit) else ""
    return result.exit_code, result.output + shown
