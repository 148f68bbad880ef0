"""RunLink: the run handle of rank 0, or of a run's only process.

Owns the run's counters, its beginning and its end. The training thread writes events to the outbox and reads commands
from the inbox; ``LinkThread`` talks to Kafka and S3. Invariant: between entering and leaving, no call waits for them,
and a call in a forked process (a DataLoader worker) does nothing.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from esper.config import Settings
from esper.connection.boundary_processor import MAX_DETAIL_CHARS, BoundaryProcessor, CommandObserver
from esper.connection.checkpoints.access_history import access_history_path
from esper.connection.checkpoints.checkpoint_store import CheckpointStore
from esper.connection.checkpoints.training_state import TrainingState, from_bytes, load_rank_state, rank_state, to_bytes
from esper.connection.commands import CommandInbox
from esper.connection.events.field_reports import AdaptationLedger
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
from esper.schemas.topics import COMMANDS, LIFECYCLE

TELEMETRY_METADATA = "telemetry_safe"  # in the outbox: the incarnation, and its number of settled telemetry records

_log = get_logger(__name__)


class RunLink:
    """A ``RunHandle`` that talks to Kafka and S3; its methods and attributes are documented there."""

    def __init__(
        self,
        training: TrainingState,
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
        cache = self._model.kernel_cache
        self._link = LinkThread(settings, run_id, self._outbox, self._spill, options, cache, access_history)
        self._ledger = AdaptationLedger(options.metric)
        self._metrics: TrainerMetrics | None = None
        self._lifecycle_offset = 0
        self._gap_from = 0

    @property
    def incarnation(self) -> int:
        return self._journal.incarnation

    @property
    def num_adaptations(self) -> int:
        return self._ledger.num_adaptations

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
                self._model, self._journal, self._link.telemetry, self._options.health_interval_steps
            )
            if saved is None:
                self._begin()
            else:
                self._resume(saved)
            self._serve_metrics()
            self._broadcast_start(saved)
        except BaseException as error:
            self._stop_metrics()
            if self._replicas is not None:
                self._replicas.broadcast({"failed": _error_text(error)})
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
        self._boundaries.release_pins()
        self._health.stop()
        self._account_for_telemetry(self.step_number)
        self._journal.try_record(
            events.RunEnded,
            step=self.step_number,
            status=status,
            results=self.results,
            detail=_error_text(value),
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
        if os.getpid() != self._pid:
            return
        with self._timed():
            finite = {k: float(v) if abs(v) < float("inf") else None for k, v in metrics.items()}
            self._ledger.last_value = finite.get(self._options.metric, self._ledger.last_value)
            self._journal.try_record(events.EpochCompleted, step=self.step_number, epoch=self.epoch, metrics=finite)
            self.epoch += 1

    def checkpoint(self, extra: Mapping[str, Any] | None = None) -> bool:
        if os.getpid() != self._pid:
            return False
        with self._timed():
            self._health.report_pending()
            own = rank_state(extra)
            if self._replicas is None:
                return self._save([own])
            is_saved = self._save([from_bytes(data) for data in self._replicas.gather(to_bytes(own))])
            self._replicas.broadcast({"is_saved": is_saved})
            return is_saved

    def observe(self, observer: CommandObserver) -> None:
        """Add an observer of the commands. Call it inside the ``with`` block, before the first step."""
        self._boundaries.observers.append(observer)

    def report(self, cause: Cause, **fields: Any) -> bool:
        """Record a ``FieldReported`` event about a transition between boundaries; False if the disk is full."""
        return self._journal.try_record(events.FieldReported, cause, step=self.step_number, **fields) is not None

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

    def _broadcast_start(self, saved: Mapping[str, Any] | None) -> None:
        """Send the other ranks the state that they begin with."""
        if self._replicas is None:
            return
        message = {
            "run_id": self.run_id,
            "incarnation": self.incarnation,
            "step": self.step_number,
            "epoch": self.epoch,
            "num_adaptations": self.num_adaptations,
            "boundary_steps": self._options.boundary_steps,
        }
        self._replicas.broadcast(message, [] if saved is None else [to_bytes(saved)])
        self._replicas.follow_growth()

    def _begin(self) -> None:
        offset = self._link.end_offset(COMMANDS)
        self._lifecycle_offset = self._link.end_offset(LIFECYCLE)
        self._prepare(CommandInbox(offset))
        layers, edges = self._model.graph()
        _warn_of_approximate_graph(self._model)
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
        self._link.receive(self._inbox, None)

    def _resume(self, saved: Mapping[str, Any]) -> None:
        if not self._link.drain(self._options.flush_timeout_s):
            raise UnavailableError("events of the earlier incarnation cannot be sent: start Kafka, then resume again")
        self._restore(saved)
        offset = int(saved["command_offset"])
        replay = self._link.read_replay(self._journal.incarnation, self.step_number, self._lifecycle_offset)
        self._prepare(CommandInbox(offset, (UUID(i) for i in saved["applied"])))
        self._boundaries.load_causes(saved.get("causes", ()))
        self._journal.record(
            events.RunResumed,
            step=self.step_number,
            from_incarnation=self._journal.incarnation - 1,
            epoch=self.epoch,
            seeds=self._model.seeds_not_dormant(),
            command_offset=offset,
        )
        self._record_crash_losses(*saved.get("telemetry", (0, 0)))
        self._link.receive(self._inbox, replay)
        self._wait_until_received(replay.applied_at)

    def _wait_until_received(self, commands: Iterable[UUID]) -> None:
        """Wait for the commands that are to be applied again, each at its exact step, before the first step."""
        deadline = time.monotonic() + self._options.flush_timeout_s
        while not self._inbox.has_seen(commands):
            if time.monotonic() > deadline:
                raise UnavailableError("commands from before the crash cannot be read from Kafka: resume again")
            time.sleep(0.01)

    def _pass_boundary(self, step: int) -> None:
        if self._replicas is not None:
            self._replicas.share_breakers()
        moves = self._boundaries.pass_boundary(step // self._options.boundary_steps, step, self.epoch)
        if self._replicas is not None:
            self._replicas.share_moves(step, moves)

    def _prepare(self, inbox: CommandInbox) -> None:
        self._inbox = inbox
        self._boundaries = BoundaryProcessor(self._model, self._training.optimizer, self._journal, inbox, self._ledger)

    def _state(self, offset: int, applied: list[str], ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._training.to_dict(),
            "ranks": ranks,
            "step": self.step_number,
            "epoch": self.epoch,
            "command_offset": offset,
            "lifecycle_offset": self._lifecycle_offset,
            "applied": applied,
            "telemetry": [self._journal.incarnation, self._health.num_reported],
            "book": self._ledger.to_dict(),
            "causes": self._boundaries.causes(),
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self._training.load_dict(saved)
        self.step_number, self.epoch = saved["step"], saved["epoch"]
        self._lifecycle_offset = saved["lifecycle_offset"]
        self._ledger.load_dict(saved["book"])
        self.restored = load_rank_state(saved["ranks"][0])

    def _account_for_telemetry(self, step: int) -> None:
        """Record lost telemetry, in one transaction with the metadata, which counts the lost records as settled."""
        self._note_settled_telemetry()
        lost = self._link.telemetry.take_lost()
        if lost:
            gap = self._journal.try_record(events.TelemetryGap, step=step, from_step=self._gap_from, num_lost=lost)
            if gap is None:
                self._link.telemetry.restore_lost(lost)
                return
            self._link.telemetry.num_gaps_recorded += 1
        self._gap_from = step

    def _note_settled_telemetry(self) -> None:
        num_settled = self._link.telemetry.num_settled
        self._journal.set_metadata(TELEMETRY_METADATA, f"{self._journal.incarnation} {num_settled}")

    def _serve_metrics(self) -> None:
        address = self._options.metrics_address
        if address is None:
            return
        parts = RunParts(
            run=self,
            model=self._model,
            outbox=self._outbox,
            spill=self._spill,
            telemetry=self._link.telemetry,
            ledger=self._ledger,
            commands=self._boundaries.num_commands,
            health=self._link.health,
        )
        self._metrics = TrainerMetrics(parts, self.step_number)
        _log.info("trainer.metrics_served", run=self.run_id, port=self._metrics.serve(address))

    def _stop_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.stop()

    def _record_crash_losses(self, incarnation: int, num_made: int) -> None:
        """Record an upper bound of the telemetry from before the checkpoint that a crash has lost from memory."""
        metadata = self._outbox.metadata().get(TELEMETRY_METADATA, "0 0")
        settled_incarnation, num_settled = (int(n) for n in metadata.split())
        if settled_incarnation > incarnation:  # a later one resumed from this checkpoint too, and recorded the loss
            return
        num_lost = num_made - (num_settled if settled_incarnation == incarnation else 0)
        if num_lost > 0:
            num_samples = -(-num_lost // max(1, len(self._model.layers)))
            from_step = max(0, self.step_number - num_samples * self._options.health_interval_steps)
            self._note_settled_telemetry()
            self._journal.try_record(events.TelemetryGap, step=self.step_number, from_step=from_step, num_lost=num_lost)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.overhead_s += time.perf_counter() - started


def _error_text(error: BaseException | None) -> str:
    """An exception as text that an event can hold; falls back to its class where its ``repr`` fails."""
    if error is None:
        return ""
    try:
        text = repr(error)
    except Exception:
        text = type(error).__name__
    return text.encode(errors="backslashreplace").decode().replace("\x00", "\\0")[:MAX_DETAIL_CHARS]


def _warn_of_approximate_graph(model: MorphableModel) -> None:
    """Log the layers whose data flow is unknown to Tamiyo."""
    topology = model.topology
    if topology is not None and topology.chained:
        _log.warning(
            "graph.approximated",
            modules=[name or type(model.host).__name__ for name in topology.chained],
            hint="torch.fx cannot trace these, so their layers count as a chain: pass example_inputs to esper.wrap",
        )
    if topology is not None and topology.unreached:
        hint = "the example inputs do not reach these layers, so they have no edges: pass inputs that do"
        _log.warning("graph.layers_unreached", layers=list(topology.unreached), hint=hint)
