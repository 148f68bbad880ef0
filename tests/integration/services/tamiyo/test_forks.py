"""Forks of a run on the real bus: the report comes late, in the run's sequence, with the metric of a branch trainer."""

import asyncio
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.conditions import wait_until
from support.events.run_messages import read_run_messages
from support.events.seed_commands import send_germinate, store_blob
from support.models.growing_model import OPTIONS
from support.processes.esper_processes import running, worker

from esper.embedded.stack import EmbeddedStack
from esper.kasmina.kernels import build_kernel, load_kernel
from esper.schemas import events, topics
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import Action, LayerKind, ReportMethod, SeedStage
from esper.services.tolaria.counterfactuals.branch_trainer import AppliedCommand, BranchTrainer, replay_commands
from esper.services.tolaria.counterfactuals.forks import Forks
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training import trainer as loop

pytestmark = pytest.mark.slow
WIDTH = 6
SCHEDULE = {"germinated": 1, "training": 1, "grafting": 2, "stabilizing": 1, "evaluating": 3, "embargo": 1}


def trainer_of(folder: Path, **fork: Any) -> TrainerSettings:
    fields = {
        "network": "mlp", "hidden": WIDTH, "depth": 2, "batch_size": 128, "copies": 1, "epochs": 6, "threads": 1,
        "seeds_per_layer": 2, "schedule": SCHEDULE, "link": {"boundary_steps": 3, "folder": folder},
        "fork": {"germination_share": 1.0, "horizon_epochs": 2, **fork},
    }  # fmt: skip
    return TrainerSettings.model_validate(fields)


async def kernel_of(stack: EmbeddedStack, module: str) -> tuple[tuple[str, int], bytes]:
    spec = BlueprintSpec(module=module, parameters=OPTIONS.get(module, {}), targets=(LayerKind.LINEAR,))
    data = build_kernel(module.replace("_", "-"), spec, LayerKind.LINEAR, WIDTH)
    return await store_blob(stack, data), data


def command_at_once(stack: EmbeddedStack, run_id: str, kernels: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two germinations are in the run's inbox before its first step: they are applied at one boundary."""
    entered = Forks.__enter__

    def enter(forks: Forks) -> Forks:
        sent = [
            asyncio.run(send_germinate(stack, run_id, kernels[0], layer_id="hidden.0", boundary=1)),
            asyncio.run(send_germinate(stack, run_id, kernels[1], layer_id="hidden.1", boundary=2)),
        ]
        wait_until(lambda: forks._run._inbox.has_seen([m.id for m in sent]), 30, "both commands")
        return entered(forks)

    monkeypatch.setattr(Forks, "__enter__", enter)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("max_parallel", [0, 1])
async def test_forked_germination_is_reported_with_both_metrics(
    stack: EmbeddedStack, tmp_path: Path, run_id: str, max_parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (low_rank, low_data), (mlp, mlp_data) = await kernel_of(stack, "low_rank"), await kernel_of(stack, "mlp")
    command_at_once(stack, run_id, [low_rank, mlp], monkeypatch)
    trainer = trainer_of(tmp_path, max_parallel=max_parallel)
    await asyncio.to_thread(loop.train, trainer, stack.settings(), run_id=run_id)

    reports = [
        m for m in await read_run_messages(stack, run_id, topics.FIELD_REPORTS) if m.data.method is ReportMethod.FORK
    ]
    commands = [
        AppliedCommand(3, Action.GERMINATE, "hidden.0", 0, load_kernel(low_data, low_rank[0])),
        AppliedCommand(3, Action.GERMINATE, "hidden.1", 0, load_kernel(mlp_data, mlp[0])),
    ]
    assert {m.data.layer_id for m in reports} == {"hidden.0", "hidden.1"}
    with_both = BranchTrainer(trainer).train(2, replay_commands(commands))
    for report in reports:
        others = [c for c in commands if c.layer_id != report.data.layer_id]
        assert report.data.before == BranchTrainer(trainer).train(2, replay_commands(others))
        assert report.data.after == with_both
        assert report.data.fork is not None
        assert (report.data.germinated_at_step, report.data.fork.horizon_steps) == (3, 27)
    everything = sorted(await read_run_messages(stack, run_id), key=lambda m: m.data.sequence)
    assert [m.data.sequence for m in everything] == list(range(len(everything)))
    assert isinstance(everything[-1].data, events.RunEnded), "late reports come before the end of the run"
    moves = {m.id: m.data for m in everything if isinstance(m.data, events.SeedTransitioned)}
    causes = [moves[m.causation_id] for m in reports]
    assert [c.to_stage for c in causes] == [SeedStage.GERMINATED] * 2
    if not max_parallel:
        await check_rows(stack, tmp_path, run_id, [m.data for m in reports])
    ends = [m.data for m in everything if isinstance(m.data, events.FieldReported) and m.data.fork is None]
    assert all(end.method is ReportMethod.BEFORE_AFTER for end in ends)


async def check_rows(stack: EmbeddedStack, folder: Path, run_id: str, reports: list[events.FieldReported]) -> None:
    """Check that the projections hold all fields of a fork, and none of them for other reports."""
    names = ", ".join(events.ForkedPair.model_fields)
    asked = f"SELECT layer_id, {names} FROM esper.field_reports WHERE run_id = %s AND method = %s ORDER BY sequence"
    with running(worker(stack, folder), "worker.ready"), psycopg.connect(stack.postgres.dsn) as connection:

        def rows(method: str) -> list[tuple[Any, ...]]:
            found = connection.execute(asked, (run_id, method)).fetchall()
            connection.commit()
            return found

        await asyncio.to_thread(wait_until, lambda: len(rows("fork")) == len(reports), 40, "the forks in their table")
        expected = [(r.layer_id, *r.fork.model_dump().values()) for r in reports if r.fork is not None]
        assert rows("fork") == expected
        assert all(set(row[1:]) == {None} for row in rows("before_after"))


async def test_run_without_forks_takes_no_snapshot(
    stack: EmbeddedStack, tmp_path: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("no forks are configured")

    monkeypatch.setattr(Forks, "__init__", refuse)
    trainer = trainer_of(tmp_path, germination_share=0.0)
    await asyncio.to_thread(loop.train, trainer, stack.settings(), run_id=run_id)
    reports = await read_run_messages(stack, run_id, topics.FIELD_REPORTS)
    assert not reports
