"""Forks of a run: selects the decisions to measure, takes the snapshots, and reports the results.

Owns the pending forks and the processes that train their branches; ``branch_measurement`` measures. Invariant: a fork
never changes the run, and is reported once, in the run's own sequence, or counted as dropped. A step pays for the
snapshot at a boundary with a forked command, and for nothing else.
"""

import hashlib
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import AsyncResult, Pool, ThreadPool
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import torch

from esper.connection.checkpoints.training_state import TrainingState
from esper.connection.commands import ReceivedCommand
from esper.connection.events.journal import Cause
from esper.connection.run_link import RunLink
from esper.embedded.processes import die_with_parent
from esper.errors import ContractError, EsperError
from esper.kasmina.distributed import Move
from esper.logging import get_logger
from esper.schemas.enums import Action, ReportMethod, SeedStage
from esper.schemas.events import CullSeed, GerminateSeed
from esper.schemas.events.seeds import END_STAGES
from esper.services.tolaria.counterfactuals.branch_measurement import (
    ForkJob,
    ForkMeasurement,
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
    """A fork that is not reported yet. ``outcome`` is the final stage of its adaptation, None until then."""

    job: ForkJob
    decision_id: UUID
    command_id: UUID
    cause: Cause
    germinated_at_step: int
    outcome: SeedStage | None = None
    result: "AsyncResult[ForkMeasurement] | None" = None


class Forks:
    """Context manager around the forks of one run; an observer of its commands.

    Leaving it kills the processes; ``finish`` waits for them first.

    Attributes:
        snapshot_s: time that the run spent on snapshots, in seconds.
        counts: forks by state: started, reported, failed, dropped, skipped.
    """

    def __init__(self, trainer: TrainerSettings, run: RunLink, training: TrainingState) -> None:
        self.snapshot_s = 0.0
        self.counts: Counter[str] = Counter()
        # another number of threads changes the bits of the results
        self._trainer = trainer.model_copy(update={"threads": torch.get_num_threads()})
        self._run = run
        self._training = training
        self._epoch_started_at = run.step_number
        self._pending: list[PendingFork] = []
        self._selected: dict[UUID, ForkJob] = {}
        self._applied_now: list[AppliedCommand] = []
        self._germinated_at: dict[SeedKey, int] = {}
        self._pool: Pool | None = None
        self._packers: ThreadPool | None = None  # packing a snapshot takes longer than copying it

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

    # -- the run's events -------------------------------------------------------------------

    def before_commands(self, commands: Sequence[ReceivedCommand], step: int) -> None:
        """Take a snapshot if a command is selected for a fork."""
        self._applied_now, self._selected = [], {}
        selected = [c for c in commands if self._is_selected(c)]
        end_of_epoch = min(self._run.epoch + self._trainer.fork.horizon_epochs, self._trainer.epochs - 1)
        num_free = self._trainer.fork.max_pending - len(self._pending)
        self.counts["skipped"] += max(0, len(selected) - num_free)
        if not selected[:num_free]:
            return
        started = time.perf_counter()
        step_in_epoch = step - self._epoch_started_at
        snapshot = snapshot_of(self._training, step=step, epoch=self._run.epoch, step_in_epoch=step_in_epoch)
        self.snapshot_s += time.perf_counter() - started
        for command in selected[:num_free]:
            kernel = command.kernel or self._training.model.held.get(_seed_of(command))
            if kernel is not None:
                decided = AppliedCommand(step, _action_of(command), *_seed_of(command), command.kernel)
                self._selected[command.message.id] = ForkJob(snapshot, decided, kernel, end_of_epoch)

    def applied(self, command: ReceivedCommand, transition: Cause, step: int) -> None:
        """Record a command for all open forks, and start its own fork if it was selected."""
        seed, job = _seed_of(command), self._selected.get(command.message.id)
        applied = job.decided if job else AppliedCommand(step, _action_of(command), *seed, command.kernel)
        self._applied_now.append(applied)
        for pending in self._open_forks():
            pending.job.commands.append(applied)
        if applied.action is Action.GERMINATE:
            self._germinated_at[seed] = step
        if job is not None:
            job.commands = list(self._applied_now)
            germinated_at = self._germinated_at.get(seed, step)
            ids = command.command.decision_id, command.message.id
            self._pending.append(PendingFork(job, *ids, transition, germinated_at))
            self.counts["started"] += 1

    def boundary_passed(self, moves: Sequence[Move]) -> None:
        """Record which adaptations ended."""
        for move in moves:
            for pending in self._open_forks():
                if (
                    pending.job.decided.seed == (move.plan.layer_id, move.plan.seed_id)
                    and move.plan.to_stage in END_STAGES
                ):
                    pending.outcome = pending.outcome or move.plan.to_stage

    def epoch_completed(self, metric: float) -> None:
        """Train the branches of forks at their horizon, and report those that are trained.

        Called after the run's own ``epoch_completed``.
        """
        epoch, self._epoch_started_at = self._run.epoch - 1, self._run.step_number
        for pending in list(self._open_forks()):
            if pending.job.end_of_epoch != epoch:
                continue
            pending.job.run_metric, pending.job.run_step = metric, self._run.step_number
            seed = self._training.model.seed(*pending.job.decided.seed)
            pending.outcome = pending.outcome or seed.stage
            if pending.job.run_step == pending.job.decided.step:  # no step lies between decision and horizon
                self._finish(pending, "skipped")
            else:
                self._start_branch(pending)
        self._report_finished()

    def finish(self) -> None:
        """At the run's end: wait for the branches, for at most ``finish_timeout_s``, and report them."""
        deadline = time.monotonic() + self._trainer.fork.finish_timeout_s
        while self._pending and time.monotonic() < deadline:
            if self._pool is None:
                pending = self._pending[0]
                self._report(pending, partial(measure, self._trainer, pending.job))
            else:
                self._report_finished()
                time.sleep(POLL_S)

    # -- for checkpoints --------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The pending forks as plain values and tensors."""
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
        """The inverse of ``to_dict``, after entering. Branches that were being trained are trained again."""
        self._germinated_at = {(layer_id, seed_id): step for layer_id, seed_id, step in saved["germinated_at"]}
        for fields in saved["pending"]:
            decision_id, command_id, cause_id, traceparent = fields["ids"]
            pending = PendingFork(
                ForkJob.from_dict(fields["job"]),
                UUID(decision_id),
                UUID(command_id),
                Cause(UUID(cause_id), traceparent),
                fields["germinated_at"],
                None if fields["outcome"] is None else SeedStage(fields["outcome"]),
            )
            self._pending.append(pending)
            if pending.job.run_metric is not None:
                self._start_branch(pending)

    # -- private ----------------------------------------------------------------------------

    def _open_forks(self) -> list[PendingFork]:
        """The forks that are not at their horizon yet."""
        return [p for p in self._pending if p.job.run_metric is None]

    def _is_selected(self, received: ReceivedCommand) -> bool:
        """Whether a command is forked: random, and the same in every process and incarnation."""
        is_germination = isinstance(received.command, GerminateSeed)
        fork = self._trainer.fork
        share = fork.germination_share if is_germination else fork.verdict_share
        seed = f"{self._trainer.rng_seed}:{received.message.id}"
        return random.Random(hashlib.sha256(seed.encode()).digest()).random() < share

    def _start_branch(self, pending: PendingFork) -> None:
        if not self._trainer.fork.max_parallel:
            return
        if self._pool is None or self._packers is None:
            self._pool = multiprocessing.get_context("spawn").Pool(self._trainer.fork.max_parallel, _initialize_worker)
            self._packers = ThreadPool(self._trainer.fork.max_parallel)
        pending.result = self._packers.apply_async(_measure_in_pool, (self._pool, self._trainer, pending.job))

    def _report_finished(self) -> None:
        for pending in list(self._pending):
            if pending.result is not None and pending.result.ready():
                self._report(pending, pending.result.get)

    def _report(self, pending: PendingFork, measurement: Callable[[], ForkMeasurement]) -> None:
        """Report a fork. A failed measurement does not end the run, whose training is valid without it."""
        try:
            measured = measurement()
        except (EsperError, RuntimeError, OSError) as error:  # torch raises RuntimeError, a broken pipe OSError
            unexpected = None if isinstance(error, ContractError) else error  # its traceback shows a bug
            decision_id = str(pending.decision_id)
            _log.warning(
                "fork.failed", run=self._run.run_id, decision=decision_id, error=str(error), exc_info=unexpected
            )
            self._finish(pending, "failed")
            return
        job = pending.job
        is_recorded = self._run.report(
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
        self._finish(pending, "reported" if is_recorded else "dropped")

    def _finish(self, pending: PendingFork, state: str) -> None:
        self._pending.remove(pending)
        self.counts[state] += 1


def _seed_of(received: ReceivedCommand) -> SeedKey:
    return received.command.layer_id, received.command.seed_id


def _action_of(received: ReceivedCommand) -> Action:
    if isinstance(received.command, GerminateSeed):
        return Action.GERMINATE
    return Action.CULL if isinstance(received.command, CullSeed) else Action.FOSSILIZE


def _measure_in_pool(pool: Pool, trainer: TrainerSettings, job: ForkJob) -> ForkMeasurement:
    return pool.apply(measure_packed, (trainer, pack_job(job)))


def _initialize_worker() -> None:
    """Give this process only the processor time that no other process wants."""
    die_with_parent()
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        os.nice(19)
