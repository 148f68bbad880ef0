"""Which decisions are forked, and what becomes of the forks: the run and its bus are fakes here."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models.growing_model import loaded_kernel

from esper.connection.checkpoints.training_state import Training, from_bytes, to_bytes
from esper.connection.commands import ReceivedCommand
from esper.connection.events.journal import Cause
from esper.kasmina.distributed import Move
from esper.schemas import ids
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.schemas.events import CullSeed, FieldReported, GerminateSeed
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.evaluation.reward import reward_of
from esper.services.tamiyo.settings import RentSettings
from esper.services.tolaria.counterfactuals.branch_trainer import AppliedCommand, BranchTrainer
from esper.services.tolaria.counterfactuals.forks import Forks
from esper.services.tolaria.settings import TrainerSettings

RUN, LAYER, BOUNDARY = "run-1", "hidden.1", 3
CAUSE = Cause(uuid.UUID(int=5), None)
RENT = RentSettings.model_validate({})


class FakeRun:
    """What Forks asks of a run; a disk that is full takes no report."""

    def __init__(self) -> None:
        self.run_id, self.step_number, self.epoch, self.is_full = RUN, 0, 0, False
        self.told: list[FieldReported] = []

    def observe(self, observer: Any) -> None:
        self.observer = observer

    def report(self, cause: Cause, **fields: Any) -> bool:
        assert cause == CAUSE
        if not self.is_full:
            named = {"run_id": RUN, "incarnation": 1, "sequence": len(self.told), "step": self.step_number}
            self.told.append(FieldReported(**named, **fields))
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


class Story:
    """A line that tells Forks what a run would tell it."""

    def __init__(self, trainer: TrainerSettings, commands: dict[int, list[ReceivedCommand]]) -> None:
        self.trainer, self.commands, self.run = trainer, commands, FakeRun()
        self.line = BranchTrainer(trainer)
        self.forks = Forks(trainer, self.run, self.line.training)  # type: ignore[arg-type]

    def train(self, first: int, last: int, value: float | None = None) -> None:
        for epoch in range(first, last + 1):
            own = self.line.train(epoch, self._steer)
            self.run.step_number, self.run.epoch = self.line.step, epoch + 1
            self._tell_moves()
            self.forks.epoch_completed(own if value is None else value)

    def _steer(self, line: BranchTrainer) -> Iterator[AppliedCommand]:
        self.run.step_number = line.step
        self._tell_moves()
        ready = self.commands.get(line.step, [])
        if ready:
            self.forks.before_commands(ready, line.step)
        for one in ready:
            action = Action.GERMINATE if one.kernel else Action.CULL
            yield AppliedCommand(line.step, action, LAYER, one.command.seed_id, one.kernel)
            self.forks.applied(one, CAUSE, line.step)

    def _tell_moves(self) -> None:
        self.forks.boundary_passed([Move(plan) for _step, plan in self.line.moves])
        self.line.moves.clear()


@pytest.fixture(autouse=True)
def _no_threads() -> None:
    torch.set_num_threads(1)


def test_a_fork_is_told_at_the_end_with_what_became_of_its_seed() -> None:
    story = Story(trainer_of(), {3: [command(1)]})
    with story.forks as forks:
        story.train(0, 3)
        forks.finish()
    (told,) = story.run.told
    assert told.outcome is SeedStage.CULLED, "nobody decided about it in EVALUATING"
    assert told.fork is not None
    assert (told.germinated_at_step, told.fork.horizon_steps, told.num_parameters) == (3, 17, 6 * 3 * 2 + 9)
    assert forks.counts == {"begun": 1, "told": 1, "skipped": 0, "dropped": 0}
    assert reward_of(told, Action.GERMINATE, RENT) is not None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("max_parallel", [0, 1])
def test_forks_wait_for_nobody_when_the_run_breaks(max_parallel: int) -> None:
    story = Story(trainer_of(max_parallel=max_parallel), {6: [command(1)]})
    with pytest.raises(RuntimeError, match="broke"), story.forks as forks:
        story.train(0, 1)
        raise RuntimeError("it broke")
    assert (forks.counts["dropped"], story.run.told) == (1, [])


def test_only_so_many_snapshots_are_kept() -> None:
    story = Story(trainer_of(max_pending=2), {3: [command(n, n - 1) for n in (1, 2, 3)], 6: [command(4, 3)]})
    with story.forks as forks:
        story.train(0, 1)
        forks.finish()
    assert (forks.counts["begun"], forks.counts["skipped"], len(story.run.told)) == (2, 2, 2)


def test_the_horizon_is_the_runs_end_where_that_is_nearer_and_no_fork_has_none() -> None:
    last = 40  # the run's last step is a boundary's, too late for anything
    story = Story(trainer_of(horizon_epochs=9), {36: [command(1)], last: [command(2, 1)]})
    story.line.model.boundary_steps = 4
    with story.forks as forks:
        story.train(0, 3)
        forks.finish()
    assert [t.fork.horizon_steps for t in story.run.told if t.fork] == [4]
    assert forks.counts["skipped"] == 1


def test_a_share_is_drawn_by_the_runs_seed() -> None:
    drawn = []
    for rng_seed in (7, 7, 8):
        trainer = trainer_of(germination_share=0.5).model_copy(update={"rng_seed": rng_seed})
        forks = Story(trainer, {}).forks
        drawn.append([forks._is_drawn(command(n)) for n in range(1, 201)])
        assert not any(forks._is_drawn(command(n, action=Action.CULL)) for n in range(1, 20)), "verdicts have their own"
    assert drawn[0] == drawn[1] != drawn[2]
    assert 70 < sum(drawn[0]) < 130


def test_a_full_disk_drops_the_report_and_says_so() -> None:
    story = Story(trainer_of(), {6: [command(1)]})
    story.run.is_full = True
    with story.forks as forks:
        story.train(0, 3)
        forks.finish()
    assert (forks.counts["told"], forks.counts["dropped"]) == (0, 1)


def test_a_branch_in_which_a_command_does_not_fit_is_no_result() -> None:
    story = Story(trainer_of(), {6: [command(1)]})
    with story.forks as forks:
        story.train(0, 3)
        forks._pending[0].job.commands.append(AppliedCommand(9, Action.FOSSILIZE, "hidden.0", 0))
        forks.finish()
    assert (forks.counts["failed"], story.run.told) == (1, [])


@pytest.mark.parametrize("saved_after", [0, 1])
def test_pending_forks_outlive_a_checkpoint(saved_after: int) -> None:
    program = {6: [command(1)], 9: [command(2, 1)], 12: [command(3, 0, Action.CULL)]}
    whole = Story(trainer_of(verdict_share=1.0), program)
    with whole.forks:
        whole.train(0, 3)
        whole.forks.finish()
    broken = Story(trainer_of(verdict_share=1.0), program)
    with broken.forks:
        broken.train(0, saved_after)
        saved = from_bytes(to_bytes({"forks": broken.forks.to_dict()}))  # plain values and tensors
        resumed = Forks(broken.trainer, broken.run, Training(broken.line.model, broken.line.training.optimizer))  # type: ignore[arg-type]
    with resumed:
        resumed.load_dict(saved["forks"])
        broken.forks = resumed
        broken.train(saved_after + 1, 3)
        resumed.finish()
    assert len(whole.run.told) == 3
    assert broken.run.told == whole.run.told
