"""Latency of control events, from the send call to the handler of a reader in another process.

Both processes use one clock (CLOCK_MONOTONIC). Three clients send the same event at the same rate, one after the
other. For events over ``SLOW_MS`` it prints whether the sender's loop was blocked, the broker acknowledged late, or the
reader's loop was blocked.
"""

import asyncio
import gc
import json
import multiprocessing
import time
import uuid
from collections.abc import Callable
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from confluent_kafka import Consumer, Producer
from rich.console import Console
from rich.table import Table

from esper.config import KafkaSettings
from esper.oona.consumer.group_consumer import GroupConsumer
from esper.oona.consumer.partition_reader import EventBatch
from esper.oona.producer import OonaProducer
from esper.schemas.events import EpochCompleted
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import RUNS, TopicSpec

RAW = TopicSpec(
    "bench-control", RUNS.num_partitions
)  # topic of the other clients, for records that are not Esper's events
RATES = (100, 500)  # events/s
SLOW_MS = 5.0
LOOP_TICK_S = 0.001  # interval of the check that a loop is not blocked
WARM_UP_S = 2.0  # left out of the figures

Times = dict[int, float]
"""Monotonic seconds by number of the event."""


class LoopWatch:
    """Intervals (begin, end) in which an event loop was blocked for more than two ticks, and of garbage collections."""

    def __init__(self) -> None:
        self.stops: list[tuple[float, float]] = []
        self.collections: list[tuple[float, float]] = []
        self._began = 0.0

    async def watch(self) -> None:
        """Watch the loop until cancelled."""
        gc.callbacks.append(self._collected)
        while True:
            before = time.monotonic()
            await asyncio.sleep(LOOP_TICK_S)
            after = time.monotonic()
            if after - before > 3 * LOOP_TICK_S:
                self.stops.append((before, after))

    def _collected(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.monotonic()
        else:
            self.collections.append((self._began, time.monotonic()))


def event(number: int) -> OonaMessage:
    body = EpochCompleted(
        run_id=f"run-{number % 7}", incarnation=1, sequence=number, step=number, epoch=number, metrics={}
    )
    return OonaMessage.of(body, id=uuid.uuid4(), source="bench")


def _value(number: int) -> bytes:
    return event(number).data.model_dump_json().encode()


# -- readers: each runs in a process until the pipe sends "stop" ---------------------------------


def read_with_oona(servers: str, pipe: Connection) -> None:
    arrived: Times = {}
    watch = LoopWatch()

    async def handle(batch: EventBatch) -> None:
        now = time.monotonic()
        arrived.update((e.message.data.epoch, now) for e in batch.events)  # type: ignore[attr-defined]

    async def read() -> None:
        async with GroupConsumer(
            KafkaSettings(bootstrap_servers=servers), f"bench-{uuid.uuid4()}", [RUNS], handle
        ) as own:
            running, watching = asyncio.create_task(own.run()), asyncio.create_task(watch.watch())
            pipe.send("ready")
            await asyncio.to_thread(pipe.recv)
            own.stop()
            await running
            watching.cancel()

    asyncio.run(read())
    pipe.send((arrived, watch.stops, watch.collections))


def read_with_aiokafka(servers: str, pipe: Connection) -> None:
    arrived: Times = {}
    watch = LoopWatch()

    async def read() -> None:
        consumer = AIOKafkaConsumer(
            RAW.name,
            bootstrap_servers=servers,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
            metadata_max_age_ms=500,
        )
        await consumer.start()
        while len(consumer.assignment()) < RAW.num_partitions:  # a new topic
            await consumer.getmany(timeout_ms=100)
        watching, stopping = asyncio.create_task(watch.watch()), asyncio.create_task(asyncio.to_thread(pipe.recv))
        pipe.send("ready")
        while not stopping.done():
            for found in (await consumer.getmany(timeout_ms=200)).values():
                now = time.monotonic()
                arrived.update((json.loads(r.value)["epoch"], now) for r in found)
        watching.cancel()
        await consumer.stop()

    asyncio.run(read())
    pipe.send((arrived, watch.stops, watch.collections))


def read_with_confluent(servers: str, pipe: Connection) -> None:
    arrived: Times = {}
    consumer = Consumer({"bootstrap.servers": servers, "group.id": str(uuid.uuid4()), "auto.offset.reset": "earliest",
                         "fetch.wait.max.ms": 100})  # fmt: skip
    consumer.subscribe([RAW.name])
    while not consumer.assignment():
        consumer.poll(0.1)
    consumer.poll(0.5)
    pipe.send("ready")
    while not pipe.poll():
        found = consumer.poll(0.2)
        if found is not None and found.value():
            arrived[json.loads(found.value())["epoch"]] = time.monotonic()
    pipe.recv()
    consumer.close()
    pipe.send((arrived, [], []))


# -- senders -------------------------------------------------------------------------------------


async def paced(first: int, rate: float, seconds: float, send: Callable[[int], Any]) -> tuple[Times, Times, LoopWatch]:
    """Call ``send(number)`` at a steady rate. Returns the times of the calls and of the acknowledgements."""
    called, acknowledged, watch = Times(), Times(), LoopWatch()
    watching, sends = asyncio.create_task(watch.watch()), set[asyncio.Task[None]]()

    async def one(number: int) -> None:
        called[number] = time.monotonic()
        await send(number)
        acknowledged[number] = time.monotonic()

    began = time.monotonic()
    for place in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + place / rate - time.monotonic()))
        task = asyncio.create_task(one(first + place))
        sends.add(task)
        task.add_done_callback(sends.discard)
    await asyncio.gather(*sends)
    watching.cancel()
    return called, acknowledged, watch


async def send_with_oona(servers: str, first: int, rate: float, seconds: float) -> tuple[Times, Times, LoopWatch]:
    async with OonaProducer(KafkaSettings(bootstrap_servers=servers)) as producer:
        await producer.send_batch([event(10**9 + n) for n in range(40)])
        return await paced(first, rate, seconds, lambda n: producer.send(event(n)))


async def send_with_aiokafka(servers: str, first: int, rate: float, seconds: float) -> tuple[Times, Times, LoopWatch]:
    producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True)
    await producer.start()
    await producer.send_and_wait(RAW.name, _value(10**9))
    try:
        return await paced(
            first, rate, seconds, lambda n: producer.send_and_wait(RAW.name, _value(n), f"run-{n % 7}".encode())
        )
    finally:
        await producer.stop()


async def send_with_confluent(servers: str, first: int, rate: float, seconds: float) -> tuple[Times, Times, LoopWatch]:
    producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, "linger.ms": 0})
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    async def poll() -> None:
        while not stopping.is_set():
            await asyncio.to_thread(producer.poll, 0.1)

    async def send(number: int) -> None:
        done = loop.create_future()
        producer.produce(
            RAW.name,
            _value(number),
            f"run-{number % 7}",
            on_delivery=lambda _e, _m: loop.call_soon_threadsafe(done.set_result, None),
        )
        await done

    polling = asyncio.create_task(poll())
    await send(10**9)
    try:
        return await paced(first, rate, seconds, send)
    finally:
        stopping.set()
        await polling


CLIENTS: dict[str, tuple[Any, Any]] = {
    "aiokafka": (send_with_aiokafka, read_with_aiokafka),
    "confluent": (send_with_confluent, read_with_confluent),
    "Oona": (send_with_oona, read_with_oona),
}


def measure_latency(console: Console, kafka: KafkaSettings, seconds: float) -> None:
    """Print percentiles of each client at each rate, and where slow events of Oona spent their time."""
    table = Table(title="latency of control events in ms, from send call to reader")
    for column in ("events/s", "client", "p50", "p99", "p99.9", "worst", "acknowledged p99", f"over {SLOW_MS:g} ms"):
        table.add_column(column, justify="right")
    traces, firsts = [], count(step=10**6)  # unique numbers, since readers start at the beginning of the log
    for rate in RATES:
        for name, (send, read) in CLIENTS.items():
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            reader = context.Process(target=read, args=(kafka.bootstrap_servers, there), daemon=True)
            reader.start()
            here.recv()
            called, acknowledged, watch = asyncio.run(
                send(kafka.bootstrap_servers, next(firsts), rate, seconds + WARM_UP_S)
            )
            time.sleep(0.5)
            here.send("stop")
            arrived, stops, collections = here.recv()
            reader.join()
            first = min(called)
            warm = [n for n in called if n - first >= rate * WARM_UP_S]
            missing = [n for n in warm if n not in arrived]
            assert not missing, f"{name} lost {len(missing)} events"
            taken = sorted(1000 * (arrived[n] - called[n]) for n in warm)
            acks = sorted(1000 * (acknowledged[n] - called[n]) for n in warm)
            slow = [n for n in warm if 1000 * (arrived[n] - called[n]) > SLOW_MS]
            table.add_row(
                str(rate),
                name,
                *(f"{_percentile(taken, p):.1f}" for p in (50, 99, 99.9, 100)),
                f"{_percentile(acks, 99):.1f}",
                f"{len(slow)} of {len(warm):,}",
            )
            if name == "Oona":
                traces.append((rate, _trace(slow, called, acknowledged, arrived, watch, stops, collections)))
    console.print(table)
    for rate, trace in traces:
        console.print(f"Oona at {rate} events/s, causes of latencies over {SLOW_MS:g} ms: {trace or 'none'}")


def _trace(
    slow: list[int],
    called: Times,
    acknowledged: Times,
    arrived: Times,
    sender: LoopWatch,
    reader_stops: list[tuple[float, float]],
    reader_collections: list[tuple[float, float]],
) -> str:
    found: dict[str, int] = {}
    for n in slow:
        span = (called[n], arrived[n])
        if _touches(span, sender.collections, 0.002) or _touches(span, reader_collections, 0.002):
            where = "Python's garbage collection"
        elif _touches(span, sender.stops):
            where = "sender's event loop blocked"
        elif _touches(span, reader_stops):
            where = "reader's event loop blocked"
        elif acknowledged[n] - called[n] > 0.8 * (span[1] - span[0]):
            where = "broker: late acknowledgement"
        else:
            where = "broker or network: late fetch"
        found[where] = found.get(where, 0) + 1
    return ", ".join(f"{number} {where}" for where, number in sorted(found.items()))


def _touches(span: tuple[float, float], stops: list[tuple[float, float]], at_least_s: float = 0.0) -> bool:
    return any(a < span[1] and b > span[0] and b - a >= at_least_s for a, b in stops)


def _percentile(ordered: list[float], percent: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
