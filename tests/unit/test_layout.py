"""The layout of the repository: symlinks, small modules and folders, names of modules, light imports."""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.paths import ROOT

CODE = ("esper", "schemas", "streams", "services")
MAX_LINES = 400
MAX_MODULES = 12
ING_NOUNS = {"encoding", "logging", "pooling", "retraining", "testing"}
"""Words in -ing that are nouns of the field."""
EXEMPT = ROOT / "esper" / "kasmina"
"""Regrouped with its redesign."""


def modules() -> list[Path]:
    return sorted(p for folder in CODE for p in (ROOT / folder).rglob("*.py") if not _is_behind_link(p))


def _is_behind_link(path: Path) -> bool:
    return any((ROOT / p).is_symlink() for p in path.relative_to(ROOT).parents)


@pytest.mark.parametrize("name", ["schemas", "streams", "services"])
def test_top_level_packages_are_linked_into_esper(name: str) -> None:
    link = ROOT / "esper" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_module_is_small_and_has_a_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES, f"split the module: at most {MAX_LINES} lines"
    if text.strip() and path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "begin the module with what it owns"


def test_folders_hold_few_modules() -> None:
    counts = Counter(p.parent for p in modules() if p.name != "__init__.py" and EXEMPT not in p.parents)
    crowded = {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > MAX_MODULES}
    assert crowded == {}, f"group the modules by purpose: at most {MAX_MODULES} in a folder"


def test_modules_are_named_by_nouns() -> None:
    verbs = [
        p
        for p in modules()
        if p.stem.endswith("ing") and p.stem.split("_")[-1] not in ING_NOUNS and EXEMPT not in p.parents
    ]
    assert [str(p.relative_to(ROOT)) for p in verbs] == [], "name a module by a noun"


def test_packages_have_docstrings() -> None:
    """Every folder with modules says in its __init__ what belongs there."""
    folders = {p.parent for p in modules() if EXEMPT not in p.parents}
    undocumented = [f for f in folders if not ast.get_docstring(ast.parse((f / "__init__.py").read_text("utf-8")))]
    assert sorted(str(f.relative_to(ROOT)) for f in undocumented) == []


def test_importing_esper_loads_nothing_heavy() -> None:
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import esper, sys; print([m for m in ('torch', 'aiokafka', 'faust') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert imported.stdout.strip() == "[]"


def test_repository_has_no_absolute_path_of_a_machine() -> None:
    found = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.$}/-])/(root|work|home)/[a-z]"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in found.stdout.splitlines() if not line.startswith("tests/unit/test_layout.py")]
    assert lines == []


def test_esper_imports_beside_a_clone_named_esper(tmp_path: Path) -> None:
    """A folder ``esper`` beside a user's script is no package, and must not hide the installed one."""
    (tmp_path / "esper").mkdir()
    (tmp_path / "own_loop.py").write_text("import esper; print(esper.connect.__name__)")
    done = subprocess.run([sys.executable, "own_loop.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "connect\n"), done.stderr
