"""More than 10,000 health events per second, encoded, sent, read and decoded for a given time; counts what arrives."""

import asyncio
import multiprocessing
import random
import time
import uuid
from multiprocessing.connection import Connection

import psutil
from rich.console import Console

from esper.config import KafkaSettings
from esper.oona.consumer.group_consumer import GroupConsumer, GroupConsumerOptions
from esper.oona.consumer.partition_reader import EventBatch
from esper.oona.producer import OonaProducer
from esper.schemas.events import LayerHealthMeasured
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.topics import TELEMETRY

PER_SECOND = 10_500
BATCH = 100  # events, as in a batch of telemetry
PRINT_INTERVAL_S = 30.0


def health_event(number: int, num_seeds: int = 1, rng: random.Random | None = None) -> OonaMessage:
    """A layer's report. With ``rng`` its statistics have all digits, as real ones do."""
    draw = rng.random if rng else lambda: 0.25
    signals = tuple(
        HealthSignal(
            layer_id="fc1",
            seed_id=n,
            chunk_id=n,
            epoch=0,
            health_score=draw(),
            activation_mean=draw(),
            activation_std=draw(),
            dead_ratio=draw(),
            gradient_norm=draw(),
        )
        for n in range(num_seeds)
    )
    body = LayerHealthMeasured(
        run_id=f"run-{number % 7}",
        incarnation=1,
        sequence=number,
        step=number,
        epoch=0,
        layer_id="fc1",
        signals=signals,
    )
    return OonaMessage.of(body, id=uuid.uuid4(), source="bench")


def _read(servers: str, pipe: Connection) -> None:
    seen: set[int] = set()
    counts = [0]

    async def handle(batch: EventBatch) -> None:
        counts[0] += len(batch.events)
        seen.update(e.message.data.sequence for e in batch.events)  # type: ignore[attr-defined]

    async def read() -> None:
        options = GroupConsumerOptions(max_batch_records=2_000)
        kafka = KafkaSettings(bootstrap_servers=servers)
        async with GroupConsumer(kafka, f"hold-{uuid.uuid4()}", [TELEMETRY], handle, options=options) as own:
            running = asyncio.create_task(own.run())
            pipe.send("ready")
            while True:
                request = await asyncio.to_thread(pipe.recv)
                pipe.send((counts[0], len(seen), psutil.Process().memory_info().rss))
                if request == "stop":
                    own.stop()
                    await running
                    return

    asyncio.run(read())


async def _send(console: Console, servers: str, seconds: float, pipe: Connection) -> tuple[int, float]:
    sent, began, printed_at = 0, time.monotonic(), time.monotonic()
    async with OonaProducer(KafkaSettings(bootstrap_servers=servers)) as producer:
        pending: set[asyncio.Task[object]] = set()
        while (now := time.monotonic()) - began < seconds:
            due = int((now - began) * PER_SECOND)
            while sent + BATCH <= due:
                batch = [health_event(n) for n in range(sent, sent + BATCH)]
                task = asyncio.create_task(producer.send_batch(batch))
                pending.add(task)
                task.add_done_callback(pending.discard)
                sent += BATCH
                await asyncio.sleep(0)
            if now - printed_at > PRINT_INTERVAL_S:
                printed_at = now
                pipe.send("count")
                read, _distinct, rss = await asyncio.to_thread(pipe.recv)
                console.print(
                    f"  {now - began:4.0f} s: sent {sent:,} ({sent / (now - began):,.0f}/s), read {read:,}, "
                    f"behind {sent - read:,}, memory {psutil.Process().memory_info().rss >> 20} + {rss >> 20} MiB"
                )
            await asyncio.sleep(0.005)
        taken = time.monotonic() - began
        await asyncio.gather(*pending)
    return sent, sent / taken


def hold(console: Console, kafka: KafkaSettings, seconds: float) -> None:
    """Print the progress every half minute, and at the end how many events arrived."""
    console.print(f"sending {PER_SECOND:,} events/s for {seconds:.0f} s")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    reader = context.Process(target=_read, args=(kafka.bootstrap_servers, there), daemon=True)
    reader.start()
    here.recv()
    sent, rate = asyncio.run(_send(console, kafka.bootstrap_servers, seconds, here))
    read, distinct, deadline = 0, 0, time.monotonic() + 60
    while distinct < sent and time.monotonic() < deadline:
        here.send("count")
        read, distinct, _rss = here.recv()
        time.sleep(0.2)
    here.send("stop")
    here.recv()
    reader.join()
    console.print(
        f"sent {sent:,} at {rate:,.0f}/s; {distinct:,} arrived ({100 * distinct / sent:.4f} %), {read - distinct:,} twice"
    )
