"""The layout keeps its promises: symlinks, import names, rooms that are not crowded."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

CODE = ("esper", "schemas", "streams", "services")
MAX_LINES = 400


def modules() -> list[Path]:
    return sorted(p for folder in CODE for p in (ROOT / folder).rglob("*.py") if not _behind_a_link(p))


def _behind_a_link(path: Path) -> bool:
    return any((ROOT / p).is_symlink() for p in path.relative_to(ROOT).parents)


@pytest.mark.parametrize("name", ["schemas", "streams", "services"])
def test_code_at_the_top_level_is_part_of_the_package(name: str) -> None:
    link = ROOT / "esper" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_is_one_room(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES, "split it: at 400 lines a module holds more than one idea"
    if text.strip() and path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "a module opens with what it owns"


def test_importing_esper_opens_and_loads_nothing_heavy() -> None:
    seen = subprocess.run(
        [
            sys.executable,
            "-c",
            "import esper, sys; print([m for m in ('torch', 'aiokafka', 'faust') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.strip() == "[]"


def test_no_absolute_path_of_a_machine_is_in_the_repository() -> None:
    found = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.$}/-])/(root|work|home)/[a-z]"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in found.stdout.splitlines() if not line.startswith("tests/unit/test_layout.py")]
    assert lines == []
