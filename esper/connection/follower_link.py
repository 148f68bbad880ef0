"""FollowerLink: the run handle of the ranks above 0. It repeats what rank 0 does.

Never talks to Kafka. Entering, boundaries and checkpoints are collectives.
"""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch

from esper.connection.checkpoints.training_state import TrainingState, from_bytes, load_rank_state, rank_state, to_bytes
from esper.errors import UnavailableError
from esper.kasmina.distributed import Replicas
from esper.logging import get_logger
from esper.schemas.assets import TrainingResults
from esper.schemas.enums import SeedStage

_log = get_logger(__name__)


class FollowerLink:
    """A ``RunHandle`` for a rank above 0. The run's name and counters are rank 0's; ``restored`` is this rank's own."""

    def __init__(self, replicas: Replicas, training: TrainingState) -> None:
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
        """Wait for rank 0 to begin or resume the run, and take over its state. Raises UnavailableError if it fails."""
        message, blobs = self._replicas.receive()
        if "failed" in message:
            raise UnavailableError(f"rank 0 could not begin the run: {message['failed']}")
        self.run_id, self.incarnation = message["run_id"], message["incarnation"]
        self.step_number, self.epoch = message["step"], message["epoch"]
        self.num_adaptations = message["num_adaptations"]
        self._boundary_steps = self._replicas.model.boundary_steps = message["boundary_steps"]
        if blobs:
            self._restore(from_bytes(blobs[0]))
        self._replicas.follow_growth()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Do nothing: this rank has no connection."""

    def step(self) -> None:
        """Count an optimizer step; at a boundary, make the changes that rank 0 has made."""
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
        """Count an epoch. The metrics of rank 0 are recorded, not these."""
        self.epoch += 1

    def checkpoint(self, extra: Mapping[str, Any] | None = None) -> bool:
        """Send this rank's state to rank 0, which saves the checkpoint; whether it was saved."""
        if os.getpid() != self._pid:
            return False
        self._replicas.gather(to_bytes(rank_state(extra)))
        message, _blobs = self._replicas.receive()
        return bool(message["is_saved"])

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self._training.load_dict(saved)
        self.restored = _restore_rank(saved, self._replicas.rank)


def _restore_rank(saved: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Load a rank's own state and return its ``extra``. A rank that the checkpoint does not have gets rank 0's."""
    if rank < len(saved["ranks"]):
        return load_rank_state(saved["ranks"][rank])
    _log.warning("rank.added", rank=rank, ranks_before=len(saved["ranks"]), seed=torch.initial_seed())
    extra: dict[str, Any] = saved["ranks"][0]["extra"]
    return extra
