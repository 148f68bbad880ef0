"""The link's thread: sends what the trainer recorded, fetches what it was asked to do.

Owns every network connection of a training process. The trainer's thread only appends to the
outbox and to bounded queues and reads the inbox: it never waits on anything here.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from esper.config import Settings
from esper.connection.commands import CommandInbox, ReceivedCommand
from esper.connection.events.telemetry_queue import TelemetryQueue
from esper.connection.kernel_fetcher import KernelFetcher
from esper.connection.settings import LinkOptions
from esper.errors import ContractError, NotAllowedError, OutboxFullError
from esper.kasmina.cache import KernelCache
from esper.logging import get_logger
from esper.metrics import Health, Problem
from esper.oona.admin.read_access import verify_readable
from esper.oona.broker_errors import TRANSIENT_ERRORS, kafka_error
from esper.oona.log_reader import assigned_consumer, partition_of, read_range, to_stored_record
from esper.oona.outbox.outbox_sender import send_oldest
from esper.oona.outbox.outbox_store import Outbox
from esper.oona.producer import OonaProducer
from esper.schemas.events import CommandRejected, SeedCommand, SeedTransitioned
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import COMMANDS, LIFECYCLE
from esper.storage.blobs import BlobStore

IDLE_S = 0.02  # how long a finished event may lie in the outbox before it is looked for
RETRY_S = (0.2, 2.0)  # after the broker refused, and after something broke
START_TIMEOUT_S = 30.0

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Replay:
    """What an earlier incarnation did after the checkpoint: command id -> step, and the refused ones."""

    applied_at: dict[UUID, int]
    rejected: frozenset[UUID]


class LinkThread:
    """One thread with an event loop. ``start`` it, then feed it; ``stop`` flushes."""

    def __init__(
        self,
        settings: Settings,
        run_id: str,
        outbox: Outbox,
        spill: Outbox,
        options: LinkOptions,
        cache: KernelCache,
        access_history: Path,
    ) -> None:
        self._settings = settings
        self._run_id = run_id
        self._partition = partition_of(run_id, COMMANDS)
        self._outbox = outbox
        self._options = options
        self._cache = cache
        self._habits = access_history
        self.telemetry = TelemetryQueue(spill, options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="esper-link", daemon=True)
        self._exits = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._producer: OonaProducer | None = None
        self._kernels: KernelFetcher | None = None
        self.health = Health(self._problems)
        self._waits_for: str | None = None  # why events stay in the outbox, while they do

    # -- the trainer's side -----------------------------------------------------------------

    def start(self) -> None:
        """Connect. The only wait on the network, before training begins.

        Raises:
            NotAllowedError: the broker refuses this user.
            UnavailableError: no broker answers.
        """
        self._thread.start()
        self._wait(self._open(), START_TIMEOUT_S)

    def end_of_commands(self) -> int:
        """The position after the newest command of the run's partition."""
        return int(self._wait(self._end_of(COMMANDS.name), START_TIMEOUT_S))

    def end_of_lifecycle(self) -> int:
        """The same for lifecycle events."""
        return int(self._wait(self._end_of(LIFECYCLE.name), START_TIMEOUT_S))

    def drain(self, timeout_s: float) -> bool:
        """Send all that waits; False where some is left after ``timeout_s``."""
        return bool(self._wait(self._drain(timeout_s), timeout_s + START_TIMEOUT_S))

    def read_replay(self, incarnation: int, step: int, lifecycle_offset: int) -> Replay:
        """What incarnations before ``incarnation`` did with commands after ``step``."""
        reading = self._read_replay(incarnation, step, lifecycle_offset)
        found: Replay = self._wait(reading, None)
        return found

    def receive(self, inbox: CommandInbox, offset: int, replay: Replay | None) -> None:
        """Begin to fill the inbox, from this offset."""
        self._wait(self._start_tasks(inbox, offset, replay), START_TIMEOUT_S)

    def stop(self) -> bool:
        """Flush within the option's time and end the thread; False where something is left."""
        is_flushed = self.drain(self._options.flush_timeout_s)
        self.abandon()
        self.telemetry.save_rest()
        return is_flushed

    def abandon(self) -> None:
        """End the thread without a flush: for a run that did not begin."""
        if not self._thread.is_alive():
            return
        self._wait(self._close(), START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- the thread's side ------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _wait(self, work: Coroutine[Any, Any, Any], timeout_s: float | None) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout_s)

    async def _open(self) -> None:
        async with AsyncExitStack() as exits:
            kafka = self._settings.need_kafka()
            await verify_readable(kafka, [COMMANDS.name, LIFECYCLE.name])
            self._producer = await exits.enter_async_context(OonaProducer(kafka, client_id=self._run_id))
            pairs = [(COMMANDS.name, self._partition), (LIFECYCLE.name, self._partition)]
            self._consumer = await exits.enter_async_context(assigned_consumer(kafka, pairs))
            s3 = self._settings.s3
            blobs = await exits.enter_async_context(BlobStore(s3)) if s3 is not None else None
            fetcher = KernelFetcher(self._cache, blobs, self._habits)
            self._kernels = await exits.enter_async_context(fetcher)
            self._exits = exits.pop_all()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._exits.aclose()

    async def _end_of(self, topic: str) -> int:
        place = TopicPartition(topic, self._partition)
        return int((await self._consumer.end_offsets([place]))[place])

    async def _start_tasks(self, inbox: CommandInbox, offset: int, replay: Replay | None) -> None:
        self._consumer.pause(TopicPartition(LIFECYCLE.name, self._partition))
        producer = self._needed_producer()
        works: dict[str, Callable[[], Awaitable[None]]] = {
            "outbox": self._keep_sending,
            "telemetry": lambda: self.telemetry.keep_sending(producer),
            "spill": lambda: self.telemetry.keep_emptying_spill(producer),
            "commands": lambda: self._keep_receiving(inbox, replay),
            "prefetch": self._needed_kernels().keep_prefetching,
            "beat": self.health.keep_beating,
        }
        self._tasks = [asyncio.create_task(_for_ever(n, w), name=f"link-{n}") for n, w in works.items()]

    def _needed_producer(self) -> OonaProducer:
        assert self._producer is not None
        return self._producer

    def _needed_kernels(self) -> KernelFetcher:
        assert self._kernels is not None
        return self._kernels

    async def _keep_sending(self) -> None:
        while True:
            try:
                is_idle = not await send_oldest(self._outbox, self._needed_producer())
                self._waits_for = None
                if is_idle:
                    await asyncio.sleep(IDLE_S)
            except (*TRANSIENT_ERRORS, OutboxFullError) as error:
                self._waits_for = str(error)
                _log.warning("outbox.delayed", events=len(self._outbox), error=str(error))
                await asyncio.sleep(RETRY_S[isinstance(error, NotAllowedError)])

    def _problems(self) -> list[Problem]:
        told = self._waits_for
        return [] if told is None else [Problem(f"events wait on this disk, and Kafka does not take them: {told}")]

    async def _keep_receiving(self, inbox: CommandInbox, replay: Replay | None) -> None:
        # begun again after a break: what was fetched and not received is read once more
        self._consumer.seek(TopicPartition(COMMANDS.name, self._partition), inbox.next_offset)
        while True:
            try:
                fetched = await self._consumer.getmany(timeout_ms=200)
            except KafkaError as error:
                explained = kafka_error(error, self._settings.need_kafka())
                _log.warning("commands.delayed", error=str(explained), retry_s=RETRY_S[1])
                await asyncio.sleep(RETRY_S[1])
                continue
            for records in fetched.values():
                await self._receive(records, inbox, replay)

    async def _receive(self, records: list[Any], inbox: CommandInbox, replay: Replay | None) -> None:
        """Fetch the kernels of all these commands at once; put them in, in the order of the log."""
        kernels = self._needed_kernels()
        async with asyncio.TaskGroup() as answers:
            mine = [(r.offset, m) for r in records if (m := self._mine(r, replay)) is not None]
            begun = [(offset, m, c, answers.create_task(kernels.answer(c))) for offset, (m, c) in mine]
            for offset, message, command, answer in begun:
                kernel, problem = await answer
                at_step = replay.applied_at.get(message.id) if replay is not None else None
                inbox.put(ReceivedCommand(message, command, offset, kernel, problem, at_step))
                inbox.passed(offset + 1)
        inbox.passed(records[-1].offset + 1)

    def _mine(self, record: Any, replay: Replay | None) -> tuple[OonaMessage, SeedCommand] | None:
        try:
            message = to_stored_record(record).decode()
        except ContractError as error:
            _log.error("command.decode_failed", offset=record.offset, error=str(error))
            return None
        command = message.data
        if not isinstance(command, SeedCommand) or command.run_id != self._run_id:
            return None
        if replay is not None and message.id in replay.rejected:
            return None
        return message, command

    async def _drain(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                if not self._tasks:
                    while await send_oldest(self._outbox, self._needed_producer()):
                        pass
                while len(self._outbox) or (self._tasks and not self.telemetry.is_empty):
                    await asyncio.sleep(IDLE_S)
        except (TimeoutError, OutboxFullError, *TRANSIENT_ERRORS):
            return False
        return True

    async def _read_replay(self, incarnation: int, step: int, lifecycle_offset: int) -> Replay:
        applied: dict[UUID, int] = {}
        rejected: set[UUID] = set()
        start = {self._partition: lifecycle_offset}
        kafka = self._settings.need_kafka()
        async for record in read_range(kafka, LIFECYCLE, partition=self._partition, start=start):
            try:
                event = record.decode().data
            except ContractError:
                continue
            match event:
                case SeedTransitioned() | CommandRejected() if event.run_id != self._run_id:
                    continue
                case SeedTransitioned(command_id=UUID() as command) if event.step > step:
                    applied.setdefault(command, event.step)
                case CommandRejected() if event.incarnation < incarnation:
                    rejected.add(event.command_id)
        return Replay(applied, frozenset(rejected - applied.keys()))


async def _for_ever(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do a piece of work that never ends; what breaks it is told, and it begins again."""
    while True:
        try:
            await work()
        except Exception:
            _log.exception("link.failed", task=name)
            await asyncio.sleep(RETRY_S[1])
