"""Folders of the repository."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DOCS = ROOT / "docs"
INFRA = ROOT / "infra"
PROCESSES = TESTS / "support" / "processes"
"""Scripts that tests start as processes."""
FAULT_SCRIPTS = TESTS / "support" / "faults"
SHARED_DATA = ROOT.parent / "shared" / "data"
"""CIFAR-10, if the machine has it."""
IMPORTS = os.pathsep.join((str(TESTS), str(ROOT)))
"""PYTHONPATH of a script that imports ``support``."""
