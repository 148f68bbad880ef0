"""BoundaryProcessor: applies commands and advances the stages of seeds at a boundary.

Owns the order of these changes and the events about them; ``esper.kasmina`` makes the changes. Invariant: a transition
is written to the outbox before it takes effect. On a full disk no seed changes, and training continues.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol
from uuid import UUID

from torch.optim import Optimizer

from esper.connection.commands import CommandInbox, ReceivedCommand, rejection_reason
from esper.connection.events.field_reports import AdaptationLedger
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

MAX_DETAIL_CHARS = 2_000  # of a text in an event

_log = get_logger(__name__)


class CommandObserver(Protocol):
    """Observes the commands of a run. May read the model; its time counts as part of the step."""

    def before_commands(self, commands: Sequence[ReceivedCommand], step: int) -> None:
        """Called before the commands are handled in this order, and before any change of this boundary."""

    def applied(self, command: ReceivedCommand, transition: Cause, step: int) -> None:
        """Called after a command was applied; ``transition`` identifies the event that records it."""

    def boundary_passed(self, moves: Sequence[Move]) -> None:
        """Called after all transitions of this boundary."""


class BoundaryProcessor:
    """Processes the boundaries of one run.

    Attributes:
        observers: called for each command.
        num_commands: the commands handled in this process, by outcome: ``applied`` or the reason of the rejection.
    """

    def __init__(
        self,
        model: MorphableModel,
        optimizer: Optimizer,
        journal: Journal,
        inbox: CommandInbox,
        ledger: AdaptationLedger,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._journal = journal
        self._inbox = inbox
        self._ledger = ledger
        self._last_transitions: dict[tuple[str, int], Cause] = {}
        self._pending_reports: list[tuple[Cause, dict[str, Any]]] = []
        self._moves: list[Move] = []
        self._pinned: dict[tuple[str, int], str] = {}
        self.observers: list[CommandObserver] = []
        self.num_commands: Counter[str] = Counter()

    def pass_boundary(self, boundary: int, step: int, epoch: int) -> list[Move]:
        """Handle the commands that are due, advance stages, record the boundary; returns the transitions made.

        On a full disk it logs an error, and returns the transitions made before.
        """
        self._moves = []
        try:
            ready = self._inbox.ready(step)
            for observer in self.observers if ready else ():
                observer.before_commands(ready, step)
            for received in ready:
                self._handle(received, boundary, step)
            for plan in self._model.plan_advance(boundary):
                self._move(plan, boundary, step, self._last_transitions.get((plan.layer_id, plan.seed_id)))
            self._record_breakers(step)
            self._record_field_reports(step)
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
        """Release the kernels of this run's seeds in the cache, at its end."""
        while self._pinned:
            self._model.kernel_cache.unpin(self._pinned.popitem()[1])

    def causes(self) -> list[list[Any]]:
        """The last transition of each seed, for a checkpoint: the cause of its next event after a resume."""
        return [[*seed, str(cause.id), cause.traceparent] for seed, cause in self._last_transitions.items()]

    def load_causes(self, saved: Iterable[Sequence[Any]]) -> None:
        """The inverse of ``causes``."""
        for layer_id, seed_id, event_id, traceparent in saved:
            self._last_transitions[layer_id, int(seed_id)] = Cause(UUID(event_id), traceparent)

    def _record_breakers(self, step: int) -> None:
        """Record the changes of circuit breakers since the last boundary; they change when their seeds fail."""
        for change in self._model.breaker_changes():
            self._journal.record(
                BreakerChanged,
                self._last_transitions.get((change.layer_id, change.seed_id)),
                step=step,
                layer_id=change.layer_id,
                seed_id=change.seed_id,
                from_state=change.from_state,
                to_state=change.to_state,
                num_failures=change.num_failures,
                detail=change.detail[:MAX_DETAIL_CHARS],
            )
            self._model.report_breaker(change)
            _log.warning(
                "breaker.changed",
                seed=f"{change.layer_id}:{change.seed_id}",
                state=change.to_state,
                detail=change.detail,
                step=step,
            )

    def _record_field_reports(self, step: int) -> None:
        """Record field reports, after their transitions took effect. On a full disk they wait for the next boundary."""
        while self._pending_reports:
            cause, report = self._pending_reports[0]
            self._journal.record(FieldReported, cause, step=step, **report)
            self._pending_reports.pop(0)

    def _handle(self, received: ReceivedCommand, boundary: int, step: int) -> None:
        plan = self._plan_or_rejection(received, step)
        if isinstance(plan, Transition):
            transition = self._move(plan, boundary, step, received.message, received)
            self.num_commands["applied"] += 1
            for observer in self.observers:
                observer.applied(received, transition, step)
        else:
            self._reject(received, plan, step)
            self.num_commands[plan[0]] += 1
        self._inbox.done(received)

    def _plan_or_rejection(self, received: ReceivedCommand, step: int) -> Transition | tuple[RejectionReason, str]:
        rejection = rejection_reason(received, self._journal.incarnation, step)
        if rejection is not None:
            return rejection
        try:
            return self._plan(received)
        except KernelError as error:
            return RejectionReason.KERNEL_INVALID, str(error)
        except ContractError as error:
            return self._seed_problem(received), str(error)

    def _plan(self, received: ReceivedCommand) -> Transition:
        command, model = received.command, self._model
        if isinstance(command, GerminateSeed):
            if received.kernel is None:
                raise KernelError("the command has no kernel")
            plan = model.plan_germinate(command.layer_id, command.seed_id, received.kernel)
            host = model.layers[command.layer_id].module
            verify_can_join(self._optimizer, host, received.kernel.weights)
            return plan
        stage = model.seed(command.layer_id, command.seed_id).stage
        if stage is not command.expected_stage:
            raise ContractError(f"the seed is {stage}, and the command expects {command.expected_stage}")
        if isinstance(command, CullSeed):
            return model.plan_cull(command.layer_id, command.seed_id)
        return model.plan_fossilize(command.layer_id, command.seed_id)

    def _seed_problem(self, received: ReceivedCommand) -> RejectionReason:
        handle = self._model.layers.get(received.command.layer_id)
        is_known = handle is not None and received.command.seed_id < handle.num_seeds
        return RejectionReason.UNEXPECTED_STAGE if is_known else RejectionReason.UNKNOWN_SEED

    def _reject(self, received: ReceivedCommand, rejection: tuple[RejectionReason, str], step: int) -> None:
        reason, detail = rejection
        self._journal.record(
            CommandRejected,
            received.message,
            step=step,
            layer_id=received.command.layer_id,
            seed_id=received.command.seed_id,
            command_id=received.message.id,
            reason=reason,
            detail=detail[:MAX_DETAIL_CHARS],
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
        message = self._journal.record(
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
        self._update_pins(plan, kernel)
        transition = Cause(message.id, message.traceparent)
        self._last_transitions[plan.layer_id, plan.seed_id] = transition
        if plan.to_stage is SeedStage.GERMINATED and received is not None:
            self._ledger.germinated(plan, received.message.id, received.command.decision_id, step)
        report = self._ledger.ended(plan)
        if report is not None:
            self._pending_reports.append((transition, report))
        _log.info(
            "seed.transitioned",
            seed=f"{plan.layer_id}:{plan.seed_id}",
            stage=plan.to_stage,
            reason=plan.reason,
            step=step,
            trace_id=trace_id_of(message.traceparent),
        )
        return transition

    def _update_pins(self, plan: Transition, kernel: LoadedKernel | None) -> None:
        """Keep the kernels of active seeds in the cache: a seed that is culled is often germinated again."""
        cache, seed = self._model.kernel_cache, (plan.layer_id, plan.seed_id)
        if plan.to_stage is SeedStage.GERMINATED and kernel is not None:
            cache.pin(kernel)
            self._pinned[seed] = kernel.kernel_sha256
            if cache.is_full_of_pins:
                _log.warning("kernel_cache.exceeded", **asdict(cache.stats), capacity=cache.capacity_bytes)
        elif plan.to_stage not in ACTIVE_STAGES and seed in self._pinned:
            cache.unpin(self._pinned.pop(seed))
