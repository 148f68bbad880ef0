"""Forks of a run: which decisions are measured, from which snapshot, and when the result is told.

Owns the pending forks and the processes that train their branches; ``branches`` measures. Invariant:
the run itself is never changed by a fork, and a fork is told once, in the run's own sequence, or counted as
dropped. What a step pays is the snapshot at a boundary with a forked command, nothing else.
"""

import hashlib
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, Pool, ThreadPool
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import torch

from esper.connection.checkpoints.training_state import Training
from esper.connection.commands import ReceivedCommand
from esper.connection.events.journal import Cause
from esper.connection.run_link import RunLink
from esper.embedded.processes import die_with_parent
from esper.errors import EsperError
from esper.kasmina.distributed import Move
from esper.logging import get_logger
from esper.schemas.enums import Action, ReportMethod, SeedStage
from esper.schemas.events import CullSeed, GerminateSeed
from esper.schemas.events.seeds import END_STAGES
from esper.services.tolaria.counterfactuals.branch_measurement import (
    ForkJob,
    Measured,
    measure,
    measure_packed,
    pack_job,
)
from esper.services.tolaria.counterfactuals.branch_trainer import AppliedCommand, SeedKey, snapshot_of
from esper.services.tolaria.settings import TrainerSettings

METRIC = "val_accuracy"
POLL_S = 0.05

_log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class PendingFork:
    """A fork that is not told yet. ``outcome`` is where its adaptation ended, None while it goes on."""

    job: ForkJob
    decision_id: UUID
    command_id: UUID
    cause: Cause
    germinated_at_step: int
    outcome: SeedStage | None = None
    result: "AsyncResult[Measured] | None" = None


class Forks:
    """Context manager around the forks of one run; an observer of its commands.

    Leaving it ends the processes; ``finish`` first waits for what they do.

    Attributes:
        snapshot_s: time that the run spent on snapshots, in seconds.
        counts: forks by what became of them: begun, told, failed, dropped, skipped.
    """

    def __init__(self, trainer: TrainerSettings, run: RunLink, training: Training) -> None:
        self.snapshot_s = 0.0
        self.counts: Counter[str] = Counter()
        self._trainer = trainer.model_copy(update={"threads": torch.get_num_threads()})  # else other bits
        self._run = run
        self._training = training
        self._epoch_began_at = run.step_number
        self._pending: list[PendingFork] = []
        self._drafted: dict[UUID, ForkJob] = {}
        self._now: list[AppliedCommand] = []
        self._germinated_at: dict[SeedKey, int] = {}
        self._pool: Pool | None = None
        self._packers: ThreadPool | None = None  # writing a snapshot out takes longer than copying it

    def __enter__(self) -> Self:
        self._run.observe(self)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
        if self._packers is not None:
            self._packers.terminate()
        self.counts["dropped"] += len(self._pending)
        self._pending = []
        if self.counts:
            _log.info("forks.finished", run=self._run.run_id, snapshot_s=round(self.snapshot_s, 4), **self.counts)

    # -- what the run does ------------------------------------------------------------------

    def before_commands(self, commands: Sequence[ReceivedCommand], step: int) -> None:
        """Take a snapshot where one of them is drawn to be forked."""
        self._now, self._drafted = [], {}
        drawn = [c for c in commands if self._is_drawn(c)]
        end_of_epoch = min(self._run.epoch + self._trainer.fork.horizon_epochs, self._trainer.epochs - 1)
        room = self._trainer.fork.max_pending - len(self._pending)
        self.counts["skipped"] += max(0, len(drawn) - room)
        if not drawn[:room]:
            return
        began = time.perf_counter()
        epoch, done = self._run.epoch, step - self._epoch_began_at
        snapshot = snapshot_of(self._training, step=step, epoch=epoch, step_in_epoch=done)
        self.snapshot_s += time.perf_counter() - began
        for command in drawn[:room]:
            kernel = command.kernel or self._training.model.held.get(_seed_of(command))
            if kernel is not None:
                decided = AppliedCommand(step, _action_of(command), *_seed_of(command), command.kernel)
                self._drafted[command.message.id] = ForkJob(snapshot, decided, kernel, end_of_epoch)

    def applied(self, command: ReceivedCommand, moved: Cause, step: int) -> None:
        """Note it for all forks that are under way; begin its own, if it was drawn."""
        seed, job = _seed_of(command), self._drafted.get(command.message.id)
        did = job.decided if job else AppliedCommand(step, _action_of(command), *seed, command.kernel)
        self._now.append(did)
        for pending in self._under_way():
            pending.job.commands.append(did)
        if did.action is Action.GERMINATE:
            self._germinated_at[seed] = step
        if job is not None:
            job.commands = list(self._now)
            since = self._germinated_at.get(seed, step)
            ids = command.command.decision_id, command.message.id
            self._pending.append(PendingFork(job, *ids, moved, since))
            self.counts["begun"] += 1

    def boundary_passed(self, moves: Sequence[Move]) -> None:
        """Note which adaptations ended."""
        for move in moves:
            for pending in self._under_way():
                if pending.job.decided.seed == (move.plan.layer_id, move.plan.seed_id) and move.plan.to_stage in END_STAGES:
                    pending.outcome = pending.outcome or move.plan.to_stage

    def epoch_completed(self, value: float) -> None:
        """Call it after the run's own: what has come to its horizon is trained, what is trained is told."""
        epoch, self._epoch_began_at = self._run.epoch - 1, self._run.step_number
        for pending in list(self._under_way()):
            if pending.job.end_of_epoch != epoch:
                continue
            pending.job.own_value, pending.job.own_step = value, self._run.step_number
            seed = self._training.model.seed(*pending.job.decided.seed)
            pending.outcome = pending.outcome or seed.stage
            if pending.job.own_step == pending.job.decided.step:  # the horizon is no step away
                self._pending.remove(pending)
                self.counts["skipped"] += 1
            else:
                self._begin(pending)
        self._tell_finished()

    def finish(self) -> None:
        """At the run's end: wait for the branches, within the settings' time, and tell them."""
        deadline = time.monotonic() + self._trainer.fork.finish_timeout_s
        while self._pending and time.monotonic() < deadline:
            if self._pool is None:
                self._measure_here(self._pending[0])
            else:
                self._tell_finished()
                time.sleep(POLL_S)

    # -- for checkpoints --------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What is pending, as plain values and tensors."""
        pending = [
            {
                "job": p.job.to_dict(),
                "ids": [str(p.decision_id), str(p.command_id), str(p.cause.id), p.cause.traceparent],
                "germinated_at": p.germinated_at_step,
                "outcome": None if p.outcome is None else str(p.outcome),
            }
            for p in self._pending
        ]
        return {"pending": pending, "germinated_at": [[*seed, step] for seed, step in self._germinated_at.items()]}

    def load_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of ``to_dict``, after entering; what was being trained is trained again."""
        self._germinated_at = {(layer_id, seed_id): step for layer_id, seed_id, step in saved["germinated_at"]}
        for one in saved["pending"]:
            decision, command, cause, traceparent = one["ids"]
            told = Cause(UUID(cause), traceparent)
            outcome = None if one["outcome"] is None else SeedStage(one["outcome"])
            job = ForkJob.from_dict(one["job"])
            pending = PendingFork(job, UUID(decision), UUID(command), told, one["germinated_at"], outcome)
            self._pending.append(pending)
            if job.own_value is not None:
                self._begin(pending)

    # -- inside -----------------------------------------------------------------------------

    def _under_way(self) -> list[PendingFork]:
        return [p for p in self._pending if p.job.own_value is None]

    def _is_drawn(self, received: ReceivedCommand) -> bool:
        is_growth = isinstance(received.command, GerminateSeed)
        share = self._trainer.fork.germination_share if is_growth else self._trainer.fork.verdict_share
        named = f"{self._trainer.rng_seed}:{received.message.id}"
        return random.Random(hashlib.sha256(named.encode()).digest()).random() < share

    def _begin(self, pending: PendingFork) -> None:
        if not self._trainer.fork.max_parallel:
            return
        if self._pool is None or self._packers is None:
            self._pool = multiprocessing.get_context("spawn").Pool(self._trainer.fork.max_parallel, _begin_worker)
            self._packers = ThreadPool(self._trainer.fork.max_parallel)
        pending.result = self._packers.apply_async(_measure_there, (self._pool, self._trainer, pending.job))

    def _tell_finished(self) -> None:
        for pending in [p for p in self._pending if p.result is not None and p.result.ready()]:
            assert pending.result is not None
            try:
                measured = pending.result.get()
            except (EsperError, RuntimeError, OSError) as error:
                self._failed(pending, error)
            else:
                self._tell(pending, measured)

    def _measure_here(self, pending: PendingFork) -> None:
        try:
            measured = measure(self._trainer, pending.job)
        except EsperError as error:
            self._failed(pending, error)
        else:
            self._tell(pending, measured)

    def _failed(self, pending: PendingFork, error: BaseException) -> None:
        self._pending.remove(pending)
        self.counts["failed"] += 1
        _log.warning("fork.failed", run=self._run.run_id, decision=str(pending.decision_id), error=str(error))

    def _tell(self, pending: PendingFork, measured: Measured) -> None:
        job = pending.job
        is_told = self._run.report(
            pending.cause,
            layer_id=job.decided.layer_id,
            seed_id=job.decided.seed_id,
            blueprint_id=job.kernel.blueprint_id,
            outcome=pending.outcome,
            decision_id=pending.decision_id,
            command_id=pending.command_id,
            method=ReportMethod.FORK,
            metric=METRIC,
            before=measured.before,
            after=measured.after,
            germinated_at_step=pending.germinated_at_step,
            num_parameters=job.kernel.num_parameters,
            fork=measured.fork,
        )
        self._pending.remove(pending)
        self.counts["told" if is_told else "dropped"] += 1


def _seed_of(received: ReceivedCommand) -> SeedKey:
    return received.command.layer_id, received.command.seed_id


def _action_of(received: ReceivedCommand) -> Action:
    if isinstance(received.command, GerminateSeed):
        return Action.GERMINATE
    return Action.CULL if isinstance(received.command, CullSeed) else Action.FOSSILIZE


def _measure_there(pool: Pool, trainer: TrainerSettings, job: ForkJob) -> Measured:
    return pool.apply(measure_packed, (trainer, pack_job(job)))


def _begin_worker() -> None:
    """A process that has the processor only when nobody else wants it."""
    die_with_parent()
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        os.nice(19)
