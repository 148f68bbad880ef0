"""RunHandle: what a training loop holds while it runs with Esper."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from esper.schemas.assets import TrainingResults


class RunHandle(Protocol):
    """One incarnation of a run, as the training loop sees it. ``esper.connect`` returns one, for a ``with`` block:

        with esper.connect(model, optimizer) as run:
            for epoch in range(run.epoch, 10):
                for batch in loader:
                    ...                 # forward, backward, optimizer.step()
                    run.step()
                run.epoch_completed({"val_accuracy": accuracy})
                run.checkpoint()

    ``step``, ``epoch_completed`` and ``checkpoint`` never wait for Kafka or S3: events are written to the outbox on the
    local disk, and a thread sends them. Once the block has been entered, Kafka may be away for any time; commands then
    arrive late. Entering waits for Kafka. Leaving waits for it ``flush_timeout_s``, plus a few seconds to disconnect.
    In a forked process, such as a DataLoader worker, these calls and the end of the block do nothing.

    Rank 0 of a run, or its only process, holds a ``RunLink``; the other ranks of a DistributedDataParallel run hold a
    ``FollowerLink``, which repeats what rank 0 does. Every rank must make the same calls at the same steps: entering,
    boundaries and checkpoints wait for all ranks.

    Attributes:
        run_id: the name of the run.
        step_number: optimizer steps so far, those before a resume included.
        epoch: completed epochs so far; also the index of the current epoch, from 0.
        overhead_s: seconds that ``step``, ``epoch_completed`` and ``checkpoint`` took in this process; 0 above rank 0.
        results: set it on rank 0 before the block ends to store the results with the run.
        restored: the ``extra`` of the checkpoint that the run resumed from; None in a new run.
    """

    run_id: str
    step_number: int
    epoch: int
    overhead_s: float
    results: TrainingResults | None
    restored: dict[str, Any] | None

    @property
    def incarnation(self) -> int:
        """The number of this attempt at the run: 1 in a new run, one more after each resume."""

    @property
    def num_adaptations(self) -> int:
        """Seeds that have germinated in the run so far."""

    def __enter__(self) -> Self:
        """Connect, and begin the run or resume it.

        Raises:
            ConfigError: the settings have no Kafka broker.
            UnavailableError: no broker answers, or the outbox cannot be opened.
            NotAllowedError: the broker refuses this client.
            OutboxFullError: the disk is full.
            ConflictError: the run exists already, or another process resumes it at the same time.
            ContractError: the run has no intact checkpoint to resume from, or the checkpoint does not fit the model.
        """

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """End the run: completed, interrupted (KeyboardInterrupt) or failed (any other exception).

        Events that Kafka has not accepted after ``flush_timeout_s`` stay on the disk; ``esper outbox send`` sends them.
        """

    def step(self) -> None:
        """Count an optimizer step. Call it after each ``optimizer.step()``, before the gradients are cleared.

        Every ``health_interval_steps`` it measures the health of the layers. Every ``boundary_steps`` it applies the
        commands that have arrived, and advances the seeds' stages; parameters may then be added to the model and the
        optimizer. On a full disk nothing grows and training continues.

        Raises:
            InvariantError: with several ranks, their steps or seeds differ.
        """

    def epoch_completed(self, metrics: Mapping[str, float]) -> None:
        """Count an epoch and record its metrics. Call it at the end of each epoch.

        Args:
            metrics: name -> value. Should include the option ``metric`` (``val_accuracy`` by default), by which field
                reports compare adaptations. NaN and infinity are recorded as null. Those of rank 0 are recorded.
        """

    def checkpoint(self, extra: Mapping[str, Any] | None = None) -> bool:
        """Save what a resumed run needs: model, seeds, optimizer, scheduler, scaler, random states and counters.

        Args:
            extra: state of the loop itself: plain values and tensors. A resumed run has it in ``restored``.

        Returns:
            Whether the checkpoint was saved. If not (the disk is full or fails), the one before is intact.
        """
