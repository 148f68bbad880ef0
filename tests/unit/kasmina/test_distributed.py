"""Two ranks of one model (two_rank_scenes.py) take the same moves in the same step and never part."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.models import two_rank_scenes
from support.paths import IMPORTS

Ranks = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What came of every scene, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    store, out, log_path = folder / "store", folder / "1.pt", folder / "1.log"
    with pytest.MonkeyPatch.context() as patch, log_path.open("wb") as log:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        command = [sys.executable, two_rank_scenes.__file__, str(store), str(out)]
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": IMPORTS}
        )
        try:
            first = two_rank_scenes.play(0, store)
            assert child.wait(30) == 0, log_path.read_text()[-3000:]
        finally:
            child.kill()
            child.wait()
    return [first, torch.load(out, weights_only=True)]


def assert_alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("scene", ["life", "bucket views"])
def test_two_ranks_grow_as_one_does_with_the_whole_batch(ranks: Ranks, scene: str) -> None:
    first, second = (rank[scene] for rank in ranks)
    assert first["stages"] == second["stages"]
    assert ("fc1", 1, "fossilized") in first["stages"]
    assert first["gradients_differ"] == 0
    assert_alike(first["weights"], second["weights"])
    assert list(first["alone"]) == list(first["weights"])
    for name, tensor in first["alone"].items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_static_graph_grows_too(ranks: Ranks) -> None:
    first, second = (rank["static graph"]["weights"] for rank in ranks)
    assert any(name.startswith("kasmina.") for name in first)
    assert_alike(first, second)


def test_a_dormant_replica_has_no_hook(ranks: Ranks) -> None:
    assert ranks[0]["dormant"]["hooks"] == 0
    assert ranks[0]["life"]["hooks"] > 0


def test_a_seed_that_fails_on_one_rank_stops_on_all_and_no_rank_hangs(ranks: Ranks) -> None:
    first, second = (rank["sick on one"] for rank in ranks)
    assert_alike(first["weights"], second["weights"])
    assert all(torch.isfinite(tensor).all() for tensor in first["weights"].values())
    assert first["open"] == second["open"] == {"fc1": True, "conv": False}
    assert first["since"] == second["since"]


def test_seeds_that_grew_before_ddp_was_made_are_averaged_too(ranks: Ranks) -> None:
    first, second = (rank["grown before"] for rank in ranks)
    assert any(name.startswith("kasmina.") for name in first["weights"])
    assert_alike(first["weights"], second["weights"])
    assert_alike(first["average"], second["average"])
    assert first["keys"] == ["conv.weight", "conv.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def test_ranks_that_parted_are_told(ranks: Ranks) -> None:
    assert ranks[0]["parted"] == {"step": "", "stage": ""}
    assert "rank 1 is at step 3, rank 0 at 2" in ranks[1]["parted"]["step"]
    assert "rank 1 cannot move as rank 0 did" in ranks[1]["parted"]["stage"]


def test_what_would_grow_on_each_rank_by_itself_is_refused(ranks: Ranks) -> None:
    for rank in ranks:
        assert "would grow on each by itself" in rank["refused"]["plain"]
        assert "SmallNet holds no seeds" in rank["refused"]["not wrapped"]
