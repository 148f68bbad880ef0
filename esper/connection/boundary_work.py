"""What happens at a boundary: commands are judged and applied, stages advance, the boundary is told.

Each move is written to the outbox before it takes effect. Where the disk is full nothing grows
and nothing moves; training goes on.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol
from uuid import UUID

from torch.optim import Optimizer

from esper.connection.commands import CommandInbox, ReceivedCommand, reason_to_reject
from esper.connection.events.field_reports import AdaptationBook
from esper.connection.events.journal import Cause, Journal
from esper.errors import ContractError, KernelError, OutboxFullError
from esper.kasmina.distributed import Move
from esper.kasmina.kernels import LoadedKernel
from esper.kasmina.lifecycle import Transition
from esper.kasmina.model import MorphableModel
from esper.kasmina.optimizers import verify_can_join
from esper.logging import get_logger, trace_id_of
from esper.schemas.enums import RejectionReason, SeedStage
from esper.schemas.events import (
    BoundaryReached,
    BreakerChanged,
    CommandRejected,
    CullSeed,
    FieldReported,
    GerminateSeed,
    SeedTransitioned,
)
from esper.schemas.lifecycle import ACTIVE_STAGES
from esper.schemas.messages import OonaMessage

_log = get_logger(__name__)


class CommandObserver(Protocol):
    """Sees what commands do to a run. It may read the model; what it does is part of the step's time."""

    def before_commands(self, commands: Sequence[ReceivedCommand], step: int) -> None:
        """These are about to be dealt with, in this order; nothing of this boundary has happened yet."""
        ...

    def applied(self, command: ReceivedCommand, moved: Cause, step: int) -> None:
        """One of them was applied; ``moved`` is the transition that tells it."""
        ...

    def boundary_passed(self, moves: Sequence[Move]) -> None:
        """All moves of this boundary were made."""
        ...


class BoundaryWork:
    """Everything a boundary touches, for one run. ``observers`` see the commands."""

    def __init__(
        self,
        model: MorphableModel,
        optimizer: Optimizer,
        journal: Journal,
        inbox: CommandInbox,
        book: AdaptationBook,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._journal = journal
        self._inbox = inbox
        self._book = book
        self._last_moves: dict[tuple[str, int], Cause] = {}
        self._untold: list[tuple[Cause, dict[str, Any]]] = []
        self._moves: list[Move] = []
        self._pinned: dict[tuple[str, int], str] = {}
        self.observers: list[CommandObserver] = []
        self.num_commands: Counter[str] = Counter()  # by outcome, in this process

    def pass_boundary(self, boundary: int, step: int, epoch: int) -> list[Move]:
        """Do all of it, and give what moved; never raises for a full disk."""
        self._moves = []
        try:
            ready = self._inbox.ready(step)
            for observer in self.observers if ready else ():
                observer.before_commands(ready, step)
            for received in ready:
                self._handle(received, boundary, step)
            for plan in self._model.plan_advance(boundary):
                self._move(plan, boundary, step, self._last_moves.get((plan.layer_id, plan.seed_id)))
            self._tell_breakers(step)
            self._tell_reports(step)
            self._journal.record(
                BoundaryReached,
                step=step,
                boundary=boundary,
                epoch=epoch,
                last_sequences=dict(self._journal.last_sequences),
            )
        except OutboxFullError as error:
            _log.error("boundary.write_failed", boundary=boundary, error=str(error))
        for observer in self.observers:
            observer.boundary_passed(self._moves)
        return self._moves

    def release_pins(self) -> None:
        """The run is over: the cache may let go of its seeds' kernels."""
        while self._pinned:
            self._model.kernel_cache.unpin(self._pinned.popitem()[1])

    def causes(self) -> list[list[Any]]:
        """Each seed's last move, for a checkpoint: what a seed does after a resume has its cause before it."""
        return [[*seed, str(cause.id), cause.traceparent] for seed, cause in self._last_moves.items()]

    def load_causes(self, saved: Iterable[Sequence[Any]]) -> None:
        """The inverse of ``causes``."""
        for layer_id, seed_id, event_id, traceparent in saved:
            self._last_moves[layer_id, int(seed_id)] = Cause(UUID(event_id), traceparent)

    def _tell_breakers(self, step: int) -> None:
        """Breakers moved when their seeds failed, between boundaries: here that is told."""
        for change in self._model.breaker_changes():
            self._journal.record(
                BreakerChanged,
                self._last_moves.get((change.layer_id, change.seed_id)),
                step=step,
                layer_id=change.layer_id,
                seed_id=change.seed_id,
                from_state=change.from_state,
                to_state=change.to_state,
                num_failures=change.num_failures,
                detail=change.detail[:2000],
            )
            self._model.report_breaker(change)
            _log.warning(
                "breaker.changed",
                seed=f"{change.layer_id}:{change.seed_id}",
                state=change.to_state,
                detail=change.detail,
                step=step,
            )

    def _tell_reports(self, step: int) -> None:
        """Field reports come after their moves took effect: on a full disk they wait for the next boundary."""
        while self._untold:
            moved, report = self._untold[0]
            self._journal.record(FieldReported, moved, step=step, **report)
            self._untold.pop(0)

    def _handle(self, received: ReceivedCommand, boundary: int, step: int) -> None:
        refused = reason_to_reject(received, self._journal.incarnation, step)
        plan = None
        if refused is None:
            try:
                plan = self._plan(received)
            except KernelError as error:
                refused = (RejectionReason.KERNEL_INVALID, str(error))
            except ContractError as error:
                refused = (self._seed_problem(received), str(error))
        if refused is not None or plan is None:
            refused = refused or (RejectionReason.KERNEL_UNAVAILABLE, "")
            self._reject(received, refused, step)
            self.num_commands[refused[0]] += 1
        else:
            moved = self._move(plan, boundary, step, received.message, received)
            self.num_commands["applied"] += 1
            for observer in self.observers:
                observer.applied(received, moved, step)
        self._inbox.done(received)

    def _plan(self, received: ReceivedCommand) -> Transition:
        command, model = received.command, self._model
        if isinstance(command, GerminateSeed):
            if received.kernel is None:
                raise KernelError("the kernel did not arrive")
            plan = model.plan_germinate(command.layer_id, command.seed_id, received.kernel)
            host = model.layers[command.layer_id].module
            verify_can_join(self._optimizer, host, received.kernel.weights)
            return plan
        stage = model.seed(command.layer_id, command.seed_id).stage
        if stage is not command.expected_stage:
            raise ContractError(f"the seed is {stage}, not {command.expected_stage}")
        if isinstance(command, CullSeed):
            return model.plan_cull(command.layer_id, command.seed_id)
        return model.plan_fossilize(command.layer_id, command.seed_id)

    def _seed_problem(self, received: ReceivedCommand) -> RejectionReason:
        handle = self._model.layers.get(received.command.layer_id)
        is_known = handle is not None and received.command.seed_id < handle.num_seeds
        return RejectionReason.UNEXPECTED_STAGE if is_known else RejectionReason.UNKNOWN_SEED

    def _reject(self, received: ReceivedCommand, why: tuple[RejectionReason, str], step: int) -> None:
        reason, detail = why
        self._journal.record(
            CommandRejected,
            received.message,
            step=step,
            layer_id=received.command.layer_id,
            seed_id=received.command.seed_id,
            command_id=received.message.id,
            reason=reason,
            detail=detail[:2000],
        )
        _log.warning(
            "command.rejected",
            command=str(received.message.id),
            reason=reason,
            detail=detail,
            trace_id=trace_id_of(received.message.traceparent),
        )

    def _move(
        self,
        plan: Transition,
        boundary: int,
        step: int,
        cause: OonaMessage | Cause | None,
        received: ReceivedCommand | None = None,
    ) -> Cause:
        moved = self._journal.record(
            SeedTransitioned,
            cause,
            step=step,
            layer_id=plan.layer_id,
            seed_id=plan.seed_id,
            from_stage=plan.from_stage,
            to_stage=plan.to_stage,
            reason=plan.reason,
            blueprint_id=plan.blueprint_id,
            kernel_sha256=plan.kernel_sha256,
            command_id=received.message.id if received else None,
            num_parameters=plan.num_parameters,
            detail=plan.detail,
        )
        kernel: LoadedKernel | None = received.kernel if received else None
        self._model.apply_transition(plan, step=step, boundary=boundary, kernel=kernel, optimizer=self._optimizer)
        self._moves.append(Move(plan, kernel))
        self._follow_pins(plan, kernel)
        told = Cause(moved.id, moved.traceparent)
        self._last_moves[plan.layer_id, plan.seed_id] = told
        if plan.to_stage is SeedStage.GERMINATED and received is not None:
            self._book.germinated(plan, received.message.id, received.command.decision_id, step)
        report = self._book.ended(plan)
        if report is not None:
            self._untold.append((told, report))
        _log.info(
            "seed.transitioned",
            seed=f"{plan.layer_id}:{plan.seed_id}",
            stage=plan.to_stage,
            reason=plan.reason,
            step=step,
            trace_id=trace_id_of(moved.traceparent),
        )
        return told

    def _follow_pins(self, plan: Transition, kernel: LoadedKernel | None) -> None:
        """The kernel of a seed under way stays in the cache: a seed that is given up is often tried again."""
        cache, seed = self._model.kernel_cache, (plan.layer_id, plan.seed_id)
        if plan.to_stage is SeedStage.GERMINATED and kernel is not None:
            cache.pin(kernel)
            self._pinned[seed] = kernel.kernel_sha256
            if cache.is_full_of_pins:
                _log.warning("kernel_cache.exceeded", **asdict(cache.stats), capacity=cache.capacity_bytes)
        elif plan.to_stage not in ACTIVE_STAGES and seed in self._pinned:
            cache.unpin(self._pinned.pop(seed))
