"""RunLink: what a training loop holds. Every call returns at once, whatever the bus does.

The trainer's thread records events in the outbox and reads the inbox; ``LinkThread`` talks to
the network. A forked process (a DataLoader's worker) that calls it does nothing.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from esper.config import Settings
from esper.connection.boundary_work import BoundaryWork, CommandObserver
from esper.connection.checkpoints.access_history import access_history_path
from esper.connection.checkpoints.checkpoint_store import CheckpointStore
from esper.connection.checkpoints.training_state import Training, from_bytes, load_own_state, own_state, to_bytes
from esper.connection.commands import CommandInbox
from esper.connection.events.field_reports import AdaptationBook
from esper.connection.events.health_reporter import HealthReporter
from esper.connection.events.journal import Cause, Journal
from esper.connection.link_thread import LinkThread
from esper.connection.metrics import RunParts, TrainerMetrics
from esper.connection.settings import OUTBOX_FILE, SPILL_FILE, LinkOptions
from esper.errors import UnavailableError
from esper.kasmina.distributed import Replicas
from esper.kasmina.model import MorphableModel
from esper.logging import get_logger
from esper.oona.outbox.outbox_store import Outbox
from esper.schemas import events
from esper.schemas.assets import TrainingResults
from esper.schemas.base import Scalar
from esper.schemas.enums import RunStatus

TELEMETRY_MARK = "telemetry_safe"  # kept in the outbox: incarnation, and how many records need no memory any more

_log = get_logger(__name__)


class RunLink:
    """One incarnation of one run. ``restored`` is the ``extra`` of the checkpoint it resumed from."""

    def __init__(
        self,
        training: Training,
        replicas: Replicas | None,
        *,
        run_id: str,
        settings: Settings,
        options: LinkOptions,
        hyperparameters: dict[str, Scalar],
        is_resumed: bool,
    ) -> None:
        self.run_id = run_id
        self.step_number = 0
        self.epoch = 0
        self.overhead_s = 0.0
        self.results: TrainingResults | None = None
        self.restored: dict[str, Any] | None = None
        self._training, self._replicas, self._model = training, replicas, training.model
        self._options, self._hyperparameters, self._is_resumed = options, hyperparameters, is_resumed
        self._pid = os.getpid()
        folder: Path = options.folder / run_id
        self._store = CheckpointStore(folder)
        self._outbox = Outbox(folder / OUTBOX_FILE, max_pages=options.outbox_max_pages)
        self._spill = Outbox(folder / SPILL_FILE)
        access_history = access_history_path(options.folder, self._model.layers.values())
        self._link = LinkThread(
            settings, run_id, self._outbox, self._spill, options, self._model.kernel_cache, access_history
        )
        self._book = AdaptationBook(options.metric)
        self._metrics: TrainerMetrics | None = None
        self._lifecycle_offset = 0
        self._gap_from = 0

    @property
    def incarnation(self) -> int:
        """Which go at the run this is."""
        return self._journal.incarnation

    @property
    def num_adaptations(self) -> int:
        """Seeds germinated so far."""
        return self._book.num_adaptations

    def __enter__(self) -> Self:
        try:
            self._outbox.open()
            self._spill.open()
            self._link.start()
            self._model.boundary_steps = self._options.boundary_steps
            saved = self._store.load_newest() if self._is_resumed else None
            incarnation = self._store.claim_incarnation(is_resumed=self._is_resumed)
            self._journal = Journal(self.run_id, incarnation, self._outbox)
            self._health = HealthReporter(
                self._model, self._journal, self._link.telemetry, self._options.health_every_steps
            )
            if saved is None:
                self._begin()
            else:
                self._resume(saved)
            self._serve_metrics()
            self._tell_beginning(saved)
        except BaseException as error:
            self._stop_metrics()
            if self._replicas is not None:
                self._replicas.tell({"failed": _told(error)})
            self._link.abandon()
            self._outbox.close()
            self._spill.close()
            raise
        self._health.begin_step(self.step_number + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:
            return
        status = RunStatus.COMPLETED
        if kind is not None:
            status = RunStatus.INTERRUPTED if issubclass(kind, KeyboardInterrupt) else RunStatus.FAILED
        self._work.release_pins()
        self._health.stop()
        self._account_for_telemetry(self.step_number)
        self._journal.try_record(
            events.RunEnded,
            step=self.step_number,
            status=status,
            results=self.results,
            detail=_told(value),
        )
        if not self._link.stop():
            _log.error(
                "run.events_unsent",
                run=self.run_id,
                events=len(self._outbox),
                telemetry=len(self._spill),
                todo=f"`esper outbox send {self._outbox.path.parent}` sends them once Kafka is back",
            )
        self._stop_metrics()
        self._outbox.close()
        self._spill.close()

    def step(self) -> None:
        """Call it after each optimizer step, before gradients are cleared."""
        if os.getpid() != self._pid:
            return
        with self._timed():
            self.step_number += 1
            step = self.step_number
            self._model.on_step(step)
            is_boundary = step % self._options.boundary_steps == 0
            self._health.end_step(step, self.epoch, is_boundary=is_boundary)
            if is_boundary:
                self._account_for_telemetry(step)
                self._pass_boundary(step)
            self._health.begin_step(step + 1)

    def epoch_completed(self, metrics: Mapping[str, float]) -> None:
        """Call it at the end of each epoch, with its metrics (the option ``metric`` among them)."""
        if os.getpid() != self._pid:
            return
        with self._timed():
            finite = {k: float(v) if abs(v) < float("inf") else None for k, v in metrics.items()}
            self._book.last_value = finite.get(self._options.metric, self._book.last_value)
            self._journal.try_record(events.EpochCompleted, step=self.step_number, epoch=self.epoch, metrics=finite)
            self.epoch += 1

    def checkpoint(self, extra: Mapping[str, Any] | None = None) -> bool:
        """Save everything that training needs to go on. False where the disk did not take it.

        Args:
            extra: the loop's own state (plain values and tensors); comes back in ``restored``.
        """
        if os.getpid() != self._pid:
            return False
        with self._timed():
            self._health.tell_rest()
            own = own_state(extra)
            if self._replicas is None:
                return self._save([own])
            is_saved = self._save([from_bytes(data) for data in self._replicas.gather(to_bytes(own))])
            self._replicas.tell({"is_saved": is_saved})
            return is_saved

    def observe(self, observer: CommandObserver) -> None:
        """Let somebody see what commands do; inside the ``with`` block, before the first step."""
        self._work.observers.append(observer)

    def report(self, cause: Cause, **fields: Any) -> bool:
        """Tell a field report that came to be known between boundaries; False where the disk is full."""
        told = self._journal.try_record(events.FieldReported, cause, step=self.step_number, **fields)
        return told is not None

    # -- inside -----------------------------------------------------------------------------

    def _save(self, ranks: list[dict[str, Any]]) -> bool:
        offset, applied = self._inbox.checkpoint()
        try:
            saved = self._store.save(self._state(offset, applied, ranks), self.step_number)
        except UnavailableError as error:
            _log.error("checkpoint.failed", error=str(error))
            return False
        self._account_for_telemetry(self.step_number)
        self._journal.try_record(
            events.CheckpointSaved,
            step=self.step_number,
            epoch=self.epoch,
            sha256=saved.sha256,
            size_bytes=saved.size_bytes,
            command_offset=offset,
        )
        return True

    def _tell_beginning(self, saved: Mapping[str, Any] | None) -> None:
        """Let the other ranks begin where this one stands."""
        if self._replicas is None:
            return
        told = {
            "run_id": self.run_id,
            "incarnation": self.incarnation,
            "step": self.step_number,
            "epoch": self.epoch,
            "num_adaptations": self.num_adaptations,
            "boundary_steps": self._options.boundary_steps,
        }
        self._replicas.tell(told, [] if saved is None else [to_bytes(saved)])
        self._replicas.follow_growth()

    def _begin(self) -> None:
        offset = self._link.end_of_commands()
        self._lifecycle_offset = self._link.end_of_lifecycle()
        self._prepare(CommandInbox(offset))
        layers, edges = self._model.graph()
        _tell_of_guesses(self._model)
        self._journal.record(
            events.RunStarted,
            step=0,
            model=type(self._model.host).__name__,
            layers=layers,
            edges=edges,
            boundary_steps=self._options.boundary_steps,
            command_offset=offset,
            hyperparameters=self._hyperparameters,
        )
        self._link.receive(self._inbox, offset, None)

    def _resume(self, saved: Mapping[str, Any]) -> None:
        if not self._link.drain(self._options.flush_timeout_s):
            raise UnavailableError("the outbox of the earlier incarnation could not be sent: is Kafka up?")
        self._restore(saved)
        offset = int(saved["command_offset"])
        replay = self._link.read_replay(self._journal.incarnation, self.step_number, self._lifecycle_offset)
        self._prepare(CommandInbox(offset, (UUID(i) for i in saved["applied"])))
        self._work.load_causes(saved.get("causes", ()))
        self._journal.record(
            events.RunResumed,
            step=self.step_number,
            from_incarnation=self._journal.incarnation - 1,
            epoch=self.epoch,
            seeds=self._model.seeds_not_dormant(),
            command_offset=offset,
        )
        self._tell_what_died(*saved.get("telemetry", (0, 0)))
        self._link.receive(self._inbox, offset, replay)
        self._await_replayed(replay.applied_at)

    def _await_replayed(self, applied_at: Mapping[UUID, int]) -> None:
        """What was applied before must be here before the first step: it is due at an exact one."""
        deadline = time.monotonic() + self._options.flush_timeout_s
        while not self._inbox.has_seen(applied_at):
            if time.monotonic() > deadline:
                raise UnavailableError("commands that were applied before the crash could not be read again")
            time.sleep(0.01)

    def _pass_boundary(self, step: int) -> None:
        if self._replicas is not None:
            self._replicas.share_breakers()
        moves = self._work.pass_boundary(step // self._options.boundary_steps, step, self.epoch)
        if self._replicas is not None:
            self._replicas.share_moves(step, moves)

    def _prepare(self, inbox: CommandInbox) -> None:
        self._inbox = inbox
        self._work = BoundaryWork(self._model, self._training.optimizer, self._journal, inbox, self._book)

    def _state(self, offset: int, applied: list[str], ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._training.to_dict(),
            "ranks": ranks,
            "step": self.step_number,
            "epoch": self.epoch,
            "command_offset": offset,
            "lifecycle_offset": self._lifecycle_offset,
            "applied": applied,
            "telemetry": [self._journal.incarnation, self._health.num_told],
            "book": self._book.to_dict(),
            "causes": self._work.causes(),
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self._training.load_dict(saved)
        self.step_number, self.epoch = saved["step"], saved["epoch"]
        self._lifecycle_offset = saved["lifecycle_offset"]
        self._book.load_dict(saved["book"])
        self.restored = load_own_state(saved["ranks"][0])

    def _account_for_telemetry(self, step: int) -> None:
        """Tell what was lost. The mark comes first: what it counts as safe because it was lost is told with it."""
        self._mark_telemetry()
        lost = self._link.telemetry.take_lost()
        if lost:
            told = self._journal.try_record(events.TelemetryGap, step=step, from_step=self._gap_from, num_lost=lost)
            if told is None:
                self._link.telemetry.keep_lost(lost)
                return
            self._link.telemetry.num_gaps_told += 1
        self._gap_from = step

    def _mark_telemetry(self) -> None:
        self._journal.set_metadata(TELEMETRY_MARK, f"{self._journal.incarnation} {self._link.telemetry.num_safe}")

    def _serve_metrics(self) -> None:
        address = self._options.metrics_address
        if address is None:
            return
        parts = RunParts(
            progress=self,
            model=self._model,
            outbox=self._outbox,
            spill=self._spill,
            telemetry=self._link.telemetry,
            book=self._book,
            commands=self._work.num_commands,
            health=self._link.health,
        )
        self._metrics = TrainerMetrics(parts, self.step_number)
        _log.info("trainer.metrics_served", run=self.run_id, port=self._metrics.serve(address))

    def _stop_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.stop()

    def _tell_what_died(self, incarnation: int, num_made: int) -> None:
        """Telemetry of before the checkpoint that was in the memory of a killed process: at most so much."""
        marked, num_safe = (int(n) for n in self._outbox.metadata().get(TELEMETRY_MARK, "0 0").split())
        if marked > incarnation:  # an incarnation between resumed from the same checkpoint, and told it
            return
        num_lost = num_made - (num_safe if marked == incarnation else 0)
        if num_lost > 0:
            num_samples = -(-num_lost // max(1, len(self._model.layers)))
            from_step = max(0, self.step_number - num_samples * self._options.health_every_steps)
            self._mark_telemetry()
            self._journal.try_record(events.TelemetryGap, step=self.step_number, from_step=from_step, num_lost=num_lost)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.overhead_s += time.perf_counter() - started


def _told(error: BaseException | None) -> str:
    """An exception as the log can hold it; one whose own text cannot be had does not hide what went wrong."""
    if error is None:
        return ""
    try:
        text = repr(error)
    except Exception:
        text = type(error).__name__
    return text.encode(errors="backslashreplace").decode().replace("\x00", "\\0")[:2000]


def _tell_of_guesses(model: MorphableModel) -> None:
    """Log where Tamiyo does not see how data flows."""
    topology = model.topology
    if topology is not None and topology.chained:
        _log.warning(
            "graph.approximated",
            modules=[name or type(model.host).__name__ for name in topology.chained],
            hint="torch.fx cannot trace these: their layers count as a chain; give esper.wrap(example_inputs=...)",
        )
    if topology is not None and topology.unreached:
        hint = "the example inputs do not reach these layers: they have no edges"
        _log.warning("graph.layers_unreached", layers=list(topology.unreached), hint=hint)
