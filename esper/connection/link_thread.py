"""LinkThread: the thread that sends a trainer's events and receives its commands.

Owns every network connection of a training process. Invariant: after the start, the training thread only appends to the
outbox and to bounded queues, and reads the inbox; it never waits for this thread.
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
from esper.errors import ContractError, OutboxFullError
from esper.kasmina.cache import KernelCache
from esper.logging import get_logger
from esper.metrics import Health, Problem
from esper.oona.admin.read_access import verify_readable
from esper.oona.broker_errors import TRANSIENT_ERRORS, kafka_error
from esper.oona.log_reader import assigned_consumer, partition_of, read_range, to_stored_record
from esper.oona.outbox.outbox_sender import send_oldest
from esper.oona.outbox.outbox_store import Outbox
from esper.oona.producer import OonaProducer
from esper.retry import Backoff
from esper.schemas.events import CommandRejected, SeedCommand, SeedTransitioned
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import COMMANDS, LIFECYCLE, TopicSpec
from esper.storage.blobs import BlobStore

IDLE_S = 0.02  # between two polls of an empty outbox
RETRY_S = (0.2, 2.0)  # first and longest wait after a failure
START_TIMEOUT_S = 30.0

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Replay:
    """What earlier incarnations did with commands after the checkpoint."""

    applied_at: dict[UUID, int]  # command id -> the step at which it was applied
    rejected: frozenset[UUID]


class LinkThread:
    """A daemon thread with an event loop. Call ``start``, then ``receive``; ``stop`` or ``abandon`` ends it."""

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
        self._access_history = access_history
        self.telemetry = TelemetryQueue(spill, options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="esper-link", daemon=True)
        self._exits = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._producer: OonaProducer  # opened by start()
        self._kernels: KernelFetcher
        self.health = Health(self._problems)
        self._send_problem: str | None = None  # why events stay in the outbox, while they do

    # -- called by the training thread ------------------------------------------------------

    def start(self) -> None:
        """Start the thread and connect.

        Raises:
            NotAllowedError: the broker refuses this client.
            UnavailableError: no broker answers.
        """
        self._thread.start()
        self._run_in_thread(self._open(), START_TIMEOUT_S)

    def end_offset(self, topic: TopicSpec) -> int:
        """The end offset of the run's partition of a topic: commands or lifecycle events."""
        return int(self._run_in_thread(self._end_offset(topic.name), START_TIMEOUT_S))

    def drain(self, timeout_s: float) -> bool:
        """Send everything that waits; False if some is left after ``timeout_s``."""
        return bool(self._run_in_thread(self._drain(timeout_s), timeout_s + START_TIMEOUT_S))

    def read_replay(self, incarnation: int, step: int, lifecycle_offset: int) -> Replay:
        """What incarnations before ``incarnation`` did with commands after ``step``.

        Args:
            lifecycle_offset: where the run begins in its partition of lifecycle events.
        """
        replay: Replay = self._run_in_thread(self._read_replay(incarnation, step, lifecycle_offset), None)
        return replay

    def receive(self, inbox: CommandInbox, replay: Replay | None) -> None:
        """Start sending, and receiving commands from the inbox's offset on."""
        self._run_in_thread(self._start_tasks(inbox, replay), START_TIMEOUT_S)

    def stop(self) -> bool:
        """Send what waits, for at most ``flush_timeout_s``, and end the thread; False if something is left on disk."""
        is_flushed = self.drain(self._options.flush_timeout_s)
        self.abandon()
        self.telemetry.save_rest()
        return is_flushed

    def abandon(self) -> None:
        """End the thread without sending: for a run that did not begin."""
        if not self._thread.is_alive():
            return
        self._run_in_thread(self._close(), START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- runs in this thread -----------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _run_in_thread(self, work: Coroutine[Any, Any, Any], timeout_s: float | None) -> Any:
        """Run a coroutine in this thread's event loop, and wait for its result."""
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
            fetcher = KernelFetcher(self._cache, blobs, self._access_history)
            self._kernels = await exits.enter_async_context(fetcher)
            self._exits = exits.pop_all()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._exits.aclose()

    async def _end_offset(self, topic: str) -> int:
        tp = TopicPartition(topic, self._partition)
        return int((await self._consumer.end_offsets([tp]))[tp])

    async def _start_tasks(self, inbox: CommandInbox, replay: Replay | None) -> None:
        self._consumer.pause(TopicPartition(LIFECYCLE.name, self._partition))
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "outbox": self._keep_sending,
            "telemetry": lambda: self.telemetry.keep_sending(self._producer),
            "spill": lambda: self.telemetry.keep_emptying_spill(self._producer),
            "commands": lambda: self._keep_receiving(inbox, replay),
            "prefetch": self._kernels.keep_prefetching,
            "beat": self.health.keep_beating,
        }
        self._tasks = [asyncio.create_task(_run_forever(n, loop), name=f"link-{n}") for n, loop in loops.items()]

    async def _keep_sending(self) -> None:
        backoff = Backoff(*RETRY_S)
        while True:
            try:
                is_idle = not await send_oldest(self._outbox, self._producer)
                self._send_problem = None
                backoff.reset()
                if is_idle:
                    await asyncio.sleep(IDLE_S)
            except (*TRANSIENT_ERRORS, OutboxFullError) as error:
                self._send_problem = str(error)
                _log.warning("outbox.delayed", events=len(self._outbox), error=str(error))
                await backoff.wait()

    def _problems(self) -> list[Problem]:
        problem = self._send_problem
        return [] if problem is None else [Problem(f"Kafka does not accept the events in the outbox: {problem}")]

    async def _keep_receiving(self, inbox: CommandInbox, replay: Replay | None) -> None:
        # after a failure this starts again: commands that were fetched and not received are read once more
        backoff = Backoff(*RETRY_S)
        self._consumer.seek(TopicPartition(COMMANDS.name, self._partition), inbox.next_offset)
        while True:
            try:
                fetched = await self._consumer.getmany(timeout_ms=200)
            except KafkaError as error:
                _log.warning("commands.delayed", error=str(kafka_error(error, self._settings.need_kafka())))
                await backoff.wait()
                continue
            backoff.reset()
            for records in fetched.values():
                await self._receive(records, inbox, replay)

    async def _receive(self, records: list[Any], inbox: CommandInbox, replay: Replay | None) -> None:
        """Fetch the kernels of these commands concurrently; add the commands to the inbox in the order of the log."""
        async with asyncio.TaskGroup() as tasks:
            commands = [(r.offset, found) for r in records if (found := self._command_in(r, replay)) is not None]
            fetches = [(offset, m, c, tasks.create_task(self._kernels.fetch_for(c))) for offset, (m, c) in commands]
            for offset, message, command, fetch in fetches:
                kernel, problem = await fetch
                at_step = replay.applied_at.get(message.id) if replay is not None else None
                inbox.put(ReceivedCommand(message, command, offset, kernel, problem, at_step))
                inbox.advance(offset + 1)
        inbox.advance(records[-1].offset + 1)

    def _command_in(self, record: Any, replay: Replay | None) -> tuple[OonaMessage, SeedCommand] | None:
        """The command in a record; None for another run's, and for one that was rejected before the resume."""
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
                    while await send_oldest(self._outbox, self._producer):
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


async def _run_forever(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop that never returns; log an exception that ends it, and start it again."""
    backoff = Backoff(*RETRY_S)
    while True:
        try:
            await loop()
        except Exception:
            _log.exception("link.failed", task=name)
            await backoff.wait()
