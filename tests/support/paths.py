"""Folders of the repository, for tests that read its files or start its scripts."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DOCS = ROOT / "docs"
INFRA = ROOT / "infra"
PROCESSES = TESTS / "support" / "processes"
"""Scripts that tests start as processes of their own."""
FAULT_SCRIPTS = TESTS / "support" / "faults"
SHARED_DATA = ROOT.parent / "shared" / "data"
"""CIFAR-10, where the machine has it."""
IMPORTS = os.pathsep.join((str(TESTS), str(ROOT)))
"""PYTHONPATH of a script that imports ``support``."""
