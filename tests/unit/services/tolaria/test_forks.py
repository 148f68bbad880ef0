"""Which decisions are forked, and how forks end: the run and its bus are fakes here."""

import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models.growing_model import loaded_kernel

from esper.connection.checkpoints.training_state import TrainingState, from_bytes, to_bytes
from esper.connection.commands import ReceivedCommand
from esper.connection.events.journal import Cause
from esper.kasmina.distributed import Move
from esper.schemas import ids
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.schemas.events import CullSeed, FieldReported, GerminateSeed
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.evaluation.reward import reward_of
from esper.services.tamiyo.settings import RentSettings
from esper.services.tolaria.counterfactuals import forks as forks_module
from esper.services.tolaria.counterfactuals.branch_trainer import AppliedCommand, BranchTrainer
from esper.services.tolaria.counterfactuals.forks import Forks
from esper.services.tolaria.settings import TrainerSettings

RUN, LAYER, BOUNDARY = "run-1", "hidden.1", 3
CAUSE = Cause(uuid.UUID(int=5), None)
RENT = RentSettings.model_validate({})


class FakeRun:
    """The part of a run that Forks uses; a full disk records no report."""

    def __init__(self) -> None:
        self.run_id, self.step_number, self.epoch, self.is_full = RUN, 0, 0, False
        self.reports: list[FieldReported] = []

    def observe(self, observer: Any) -> None:
        self.observer = observer

    def report(self, cause: Cause, **fields: Any) -> bool:
        assert cause == CAUSE
        if not self.is_full:
            named = {"run_id": RUN, "incarnation": 1, "sequence": len(self.reports), "step": self.step_number}
            self.reports.append(FieldReported(**named, **fields))
        return not self.is_full


def trainer_of(**fork: Any) -> TrainerSettings:
    schedule = {"germinated": 1, "training": 1, "grafting": 1, "stabilizing": 1, "evaluating": 1, "embargo": 1}
    return TrainerSettings.model_validate(
        {
            "network": "mlp", "hidden": 6, "depth": 2, "batch_size": 128, "copies": 1, "epochs": 4, "threads": 1,
            "seeds_per_layer": 4, "link": {"boundary_steps": BOUNDARY}, "schedule": schedule,
            "fork": {"germination_share": 1.0, "horizon_epochs": 1, "max_parallel": 0, **fork},
        }
    )  # fmt: skip


def command(number: int, seed_id: int = 0, action: Action = Action.GERMINATE) -> ReceivedCommand:
    decision = ids.decision_id(RUN, 1, number)
    kernel = loaded_kernel(LayerKind.LINEAR, 6, "mlp") if action is Action.GERMINATE else None
    fields: dict[str, Any] = {
        "run_id": RUN, "incarnation": 1, "boundary": number, "decision_id": decision, "layer_id": LAYER,
        "seed_id": seed_id, "expires_at_step": 999,
    }  # fmt: skip
    event: GerminateSeed | CullSeed = CullSeed(**fields, expected_stage=SeedStage.EVALUATING)
    if kernel is not None:
        named = {"blueprint_id": kernel.blueprint_id, "blueprint_version": 3, "kernel_sha256": kernel.kernel_sha256}
        event = GerminateSeed(**fields, **named, kernel_size_bytes=9)
    return ReceivedCommand(OonaMessage.of(event, id=ids.command_id(decision), source="test"), event, 0, kernel)


class ScriptedRun:
    """A branch that calls Forks as a run does, with scripted commands."""

    def __init__(self, trainer: TrainerSettings, commands: dict[int, list[ReceivedCommand]]) -> None:
        self.trainer, self.commands, self.run = trainer, commands, FakeRun()
        self.branch = BranchTrainer(trainer)
        self.forks = Forks(trainer, self.run, self.branch.training)  # type: ignore[arg-type]

    def train(self, first: int, last: int, value: float | None = None) -> None:
        for epoch in range(first, last + 1):
            own = self.branch.train(epoch, self._schedule)
            self.run.step_number, self.run.epoch = self.branch.step, epoch + 1
            self._pass_moves()
            self.forks.epoch_completed(own if value is None else value)

    def _schedule(self, branch: BranchTrainer) -> Iterator[AppliedCommand]:
        self.run.step_number = branch.step
        self._pass_moves()
        ready = self.commands.get(branch.step, [])
        if ready:
            self.forks.before_commands(ready, branch.step)
        for one in ready:
            action = Action.GERMINATE if one.kernel else Action.CULL
            yield AppliedCommand(branch.step, action, LAYER, one.command.seed_id, one.kernel)
            self.forks.applied(one, CAUSE, branch.step)

    def _pass_moves(self) -> None:
        self.forks.boundary_passed([Move(plan) for _step, plan in self.branch.moves])
        self.branch.moves.clear()


@pytest.fixture(autouse=True)
def _no_threads() -> None:
    torch.set_num_threads(1)


def test_fork_is_reported_with_the_outcome_of_its_seed() -> None:
    scripted = ScriptedRun(trainer_of(), {3: [command(1)]})
    with scripted.forks as forks:
        scripted.train(0, 3)
        forks.finish()
    (report,) = scripted.run.reports
    assert report.outcome is SeedStage.CULLED, "no decision came in EVALUATING"
    assert report.fork is not None
    assert (report.germinated_at_step, report.fork.horizon_steps, report.num_parameters) == (3, 17, 6 * 3 * 2 + 9)
    assert forks.counts == {"started": 1, "reported": 1, "skipped": 0, "dropped": 0}
    assert reward_of(report, Action.GERMINATE, RENT) is not None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("max_parallel", [0, 1])
def test_forks_are_dropped_when_the_run_fails(max_parallel: int) -> None:
    scripted = ScriptedRun(trainer_of(max_parallel=max_parallel), {6: [command(1)]})
    with pytest.raises(RuntimeError, match="broke"), scripted.forks as forks:
        scripted.train(0, 1)
        raise RuntimeError("it broke")
    assert (forks.counts["dropped"], scripted.run.reports) == (1, [])


def test_snapshots_are_bounded() -> None:
    scripted = ScriptedRun(trainer_of(max_pending=2), {3: [command(n, n - 1) for n in (1, 2, 3)], 6: [command(4, 3)]})
    with scripted.forks as forks:
        scripted.train(0, 1)
        forks.finish()
    assert (forks.counts["started"], forks.counts["skipped"], len(scripted.run.reports)) == (2, 2, 2)


def test_horizon_ends_with_the_run_and_is_never_empty() -> None:
    last = 40  # the run's last step is a boundary's, too late for anything
    scripted = ScriptedRun(trainer_of(horizon_epochs=9), {36: [command(1)], last: [command(2, 1)]})
    scripted.branch.model.boundary_steps = 4
    with scripted.forks as forks:
        scripted.train(0, 3)
        forks.finish()
    assert [t.fork.horizon_steps for t in scripted.run.reports if t.fork] == [4]
    assert forks.counts["skipped"] == 1


def test_selection_follows_the_run_seed() -> None:
    drawn = []
    for rng_seed in (7, 7, 8):
        trainer = trainer_of(germination_share=0.5).model_copy(update={"rng_seed": rng_seed})
        forks = ScriptedRun(trainer, {}).forks
        drawn.append([forks._is_selected(command(n)) for n in range(1, 201)])
        assert not any(forks._is_selected(command(n, action=Action.CULL)) for n in range(1, 20)), (
            "verdicts have their own share"
        )
    assert drawn[0] == drawn[1] != drawn[2]
    assert 70 < sum(drawn[0]) < 130


def test_full_disk_drops_the_report_and_counts_it() -> None:
    scripted = ScriptedRun(trainer_of(), {6: [command(1)]})
    scripted.run.is_full = True
    with scripted.forks as forks:
        scripted.train(0, 3)
        forks.finish()
    assert (forks.counts["reported"], forks.counts["dropped"]) == (0, 1)


def test_branch_with_an_inapplicable_command_fails() -> None:
    scripted = ScriptedRun(trainer_of(), {6: [command(1)]})
    with scripted.forks as forks:
        scripted.train(0, 3)
        forks._pending[0].job.commands.append(AppliedCommand(9, Action.FOSSILIZE, "hidden.0", 0))
        forks.finish()
    assert (forks.counts["failed"], scripted.run.reports) == (1, [])


def measurement_that_raises(error: Exception) -> Callable[..., None]:
    def measure(*_arguments: object) -> None:
        raise error

    return measure


def test_branch_that_torch_refuses_fails_with_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    log = SimpleNamespace(warning=lambda _event, **fields: logged.append(fields), info=lambda *_a, **_f: None)
    error = RuntimeError("out of memory")
    monkeypatch.setattr(forks_module, "_log", log)
    monkeypatch.setattr(forks_module, "measure", measurement_that_raises(error))
    scripted = ScriptedRun(trainer_of(), {6: [command(1)]})
    with scripted.forks as forks:
        scripted.train(0, 3)
        forks.finish()
    assert (forks.counts["failed"], forks.counts["dropped"], scripted.run.reports) == (1, 0, [])
    assert [(one["error"], one["exc_info"]) for one in logged] == [("out of memory", error)]


def test_bug_in_a_measurement_ends_the_run_and_drops_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks_module, "measure", measurement_that_raises(AssertionError("a bug")))
    scripted = ScriptedRun(trainer_of(), {6: [command(1)]})
    with pytest.raises(AssertionError, match="a bug"), scripted.forks as forks:
        scripted.train(0, 3)
        forks.finish()
    assert (forks.counts["failed"], forks.counts["dropped"]) == (0, 1)


@pytest.mark.parametrize("saved_after", [0, 1])
def test_pending_forks_survive_a_checkpoint(saved_after: int) -> None:
    program = {6: [command(1)], 9: [command(2, 1)], 12: [command(3, 0, Action.CULL)]}
    whole = ScriptedRun(trainer_of(verdict_share=1.0), program)
    with whole.forks:
        whole.train(0, 3)
        whole.forks.finish()
    broken = ScriptedRun(trainer_of(verdict_share=1.0), program)
    with broken.forks:
        broken.train(0, saved_after)
        saved = from_bytes(to_bytes({"forks": broken.forks.to_dict()}))  # plain values and tensors
        resumed = Forks(
            broken.trainer, broken.run, TrainingState(broken.branch.model, broken.branch.training.optimizer)
        )  # type: ignore[arg-type]
    with resumed:
        resumed.load_dict(saved["forks"])
        broken.forks = resumed
        broken.train(saved_after + 1, 3)
        resumed.finish()
    assert len(whole.run.reports) == 3
    assert broken.run.reports == whole.run.reports
