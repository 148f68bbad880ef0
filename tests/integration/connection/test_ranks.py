"""One run on two ranks: they grow in the same step, save together, and resume bit for bit."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conditions import wait_until
from support.events.run_messages import read_run_messages
from support.events.seed_commands import send_germinate, store_kernel
from support.processes import two_trainers
from support.processes.esper_processes import process

from esper.connection.run_link import RunLink
from esper.embedded.stack import EmbeddedStack
from esper.schemas import events, topics
from esper.schemas.enums import SeedStage


@pytest.mark.timeout(180)
async def test_two_ranks_grow_alike_and_resume_bit_for_bit(
    stack: EmbeddedStack, tmp_path: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    kernel = await store_kernel(stack, 8)
    store, out = tmp_path / "store", tmp_path / "1.pt"
    loop = asyncio.get_running_loop()

    def ask(run: Any) -> None:
        assert isinstance(run, RunLink)
        command = asyncio.run_coroutine_threadsafe(send_germinate(stack, run_id, kernel), loop).result(30)
        wait_until(lambda: run._inbox.has_seen([command.id]), 30, "the command")

    arguments = (str(store), str(tmp_path / "rank-1"), run_id, str(out))
    other = process(
        stack, tmp_path, "rank-1", sys.executable, two_trainers.__file__, *arguments, GLOO_SOCKET_IFNAME="lo"
    )
    other.start()
    try:
        settings = stack.settings()
        first = await asyncio.to_thread(two_trainers.play, 0, store, tmp_path / "rank-0", run_id, settings, ask)
        await asyncio.to_thread(wait_until, lambda: not other.is_alive, 30, "the end of rank 1")
        assert other.returncode == 0, other.tail()
    finally:
        other.stop()
    second = torch.load(out, weights_only=True)
    assert not (tmp_path / "rank-1").exists()
    for of_first, of_second, incarnation in zip(first, second, (1, 2), strict=True):
        assert of_first["run"] == of_second["run"] == [run_id, incarnation, 1]
        assert of_first["stages"] == of_second["stages"]
        assert_alike(of_first["weights"], of_second["weights"])
    whole, resumed = first
    assert str(SeedStage.CULLED) in {stage for stages in whole["stages"] for stage in stages}
    assert whole["stages"][two_trainers.CHECKPOINT_STEP :] == resumed["stages"]
    assert_alike(whole["weights"], resumed["weights"])
    assert (resumed["restored"], second[1]["restored"]) == ({"rank": 0}, {"rank": 1})
    moved = [m.data for m in await read_run_messages(stack, run_id, topics.LIFECYCLE)]
    germinated = [e for e in moved if isinstance(e, events.SeedTransitioned) and e.to_stage is SeedStage.GERMINATED]
    assert [(e.incarnation, e.step) for e in germinated] == [(1, 10)]


def assert_alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
