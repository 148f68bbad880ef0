"""FollowerLink: what the ranks above 0 of a run hold. It has RunLink's face, and follows rank 0.

It never talks to Kafka. Entering, boundaries and checkpoints are collectives: every rank calls
``step`` as often as rank 0 does, and ``checkpoint`` where it does.
"""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch

from esper.connection.checkpoints.training_state import Training, from_bytes, load_own_state, own_state, to_bytes
from esper.errors import UnavailableError
from esper.kasmina.distributed import Replicas
from esper.logging import get_logger
from esper.schemas.assets import TrainingResults
from esper.schemas.enums import SeedStage

_log = get_logger(__name__)


class FollowerLink:
    """One rank's go at a run. Numbers and names are rank 0's; ``restored`` is this rank's own ``extra``."""

    def __init__(self, replicas: Replicas, training: Training) -> None:
        self.run_id = ""
        self.incarnation = 0
        self.step_number = 0
        self.epoch = 0
        self.num_adaptations = 0
        self.overhead_s = 0.0
        self.results: TrainingResults | None = None
        self.restored: dict[str, Any] | None = None
        self._replicas = replicas
        self._training = training
        self._boundary_steps = 1
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        told, blobs = self._replicas.hear()
        if "failed" in told:
            raise UnavailableError(f"rank 0 could not begin: {told['failed']}")
        self.run_id, self.incarnation = told["run_id"], told["incarnation"]
        self.step_number, self.epoch = told["step"], told["epoch"]
        self.num_adaptations = told["num_adaptations"]
        self._boundary_steps = self._replicas.model.boundary_steps = told["boundary_steps"]
        if blobs:
            self._restore(from_bytes(blobs[0]))
        self._replicas.follow_growth()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Nothing is open here."""

    def step(self) -> None:
        """Call it after each optimizer step, on every rank; at a boundary it does what rank 0 did."""
        if os.getpid() != self._pid:
            return
        self.step_number += 1
        step, model = self.step_number, self._replicas.model
        model.on_step(step)
        if step % self._boundary_steps == 0:
            self._replicas.share_breakers()
            plans = self._replicas.take_moves(step, step // self._boundary_steps, self._training.optimizer)
            self.num_adaptations += sum(plan.to_stage is SeedStage.GERMINATED for plan in plans)

    def epoch_completed(self, metrics: Mapping[str, float]) -> None:
        """Counts the epoch; the metrics that are told are rank 0's."""
        self.epoch += 1

    def checkpoint(self, extra: Mapping[str, Any] | None = None) -> bool:
        """Give rank 0 what this rank has for itself; whether rank 0 saved it all."""
        if os.getpid() != self._pid:
            return False
        self._replicas.gather(to_bytes(own_state(extra)))
        told, _blobs = self._replicas.hear()
        return bool(told["is_saved"])

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self._training.load_dict(saved)
        self.restored = restore_rank(saved, self._replicas.rank)


def restore_rank(saved: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Load what a rank had for itself, and give its ``extra``; a rank that was not there gets rank 0's."""
    if rank < len(saved["ranks"]):
        return load_own_state(saved["ranks"][rank])
    _log.warning("rank.added", rank=rank, ranks_before=len(saved["ranks"]), seed=torch.initial_seed())
    extra: dict[str, Any] = saved["ranks"][0]["extra"]
    return extra
