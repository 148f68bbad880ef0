"""`make train-tamiyo` and `make compare-tamiyo` in their smallest size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.slow

RUN_ON_STACK = ROOT / "scripts" / "run_on_stack.py"
QUICK = {"WIDTH": 8, "NUM_BATCHES": 6, "BATCH_SIZE": 32, "EVAL_EVERY": 3}


@pytest.mark.timeout(1800)
def test_policy_is_trained_from_scratch_and_compared(tmp_path: Path) -> None:
    """A corpus, a fitted policy and its comparison on runs and hosts that it was not trained on.

    The hashes of the run ids of seed 8 hold out 3 of 8 runs, and 2 of the other 5 for early stopping.
    """
    policy, table = tmp_path / "policy", tmp_path / "table.json"
    commands = (
        "tamiyo corpus --runs 8 --services --folder {folder} --seed 8",
        f"tamiyo retrain --into {policy} --held-out 0.4 --quiet",
        f"tamiyo compare --fitted {policy} --runs 1 --hosts 1 --policy active --folder {{folder}} --into {table}",
    )
    quick = {f"ESPER_TAMIYO__TRAINING__{name}": str(value) for name, value in QUICK.items()}
    done = subprocess.run(
        [sys.executable, str(RUN_ON_STACK), "--new", str(policy), *commands],
        env={**os.environ, **quick},
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    match = re.search(r"│ decisions +│ +(\d+)", printed)
    assert match is not None, printed
    assert int(match[1]) > 8 * 15
    assert re.search(r"forks +│ +\d+", printed), printed
    card = json.loads((policy / "card.json").read_text())
    assert len(card["train"]["runs"]) + len(card["held_out"]["runs"]) == 8
    found = json.loads(table.read_text())
    names = ["wait", "placebo", "active", "active, from scratch"]
    assert {title: [row["name"] for row in rows] for title, rows in found.items()} == {
        "held-out runs": names,
        "held-out hosts": names,
    }
    for rows in found.values():
        assert rows[0]["gain"]["value"] == 0
        assert rows[0]["parameters"] == rows[0]["training_flops"] == 1
        assert all(row["num_plans"] == 1 and row["accuracy"]["value"] > 0.1 for row in rows)
