"""Try Tamiyo's policy in each way that it can be installed: without torch-scatter, with it alone, with both.

torch-scatter is compiled for the torch in .venv, which takes some 7 minutes and a C++ compiler, once: it goes into
.scatter, beside .venv and not into it. "Alone" means that torch-geometric cannot be imported.
Run by ``make test-scatter``.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCATTER = ROOT / ".scatter"
PINS = ROOT / "requirements" / "scatter.txt"
TESTS = ("tests/unit/services/tamiyo/gnn/test_gnn.py", "tests/unit/services/tamiyo/gnn/test_policy_trainer.py")
MODES = {
    "base: torch-geometric": (False, ()),
    "accelerated: torch-scatter": (True, ("--hide", "torch_geometric")),
    "combined: both": (True, ()),
}


def build() -> None:
    """Compile torch-scatter where it is not yet there for this torch."""
    stamp, wanted = SCATTER / "built.txt", f"{PINS.read_text()}torch {version('torch')}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if shutil.which("c++") is None and shutil.which("g++") is None:
        sys.exit("torch-scatter has to be compiled: install a C++ compiler (Debian, Ubuntu: apt-get install g++)")
    print("compiling torch-scatter, once: about 7 minutes", flush=True)
    uv = (Path(sys.executable).parent / "uv", "pip", "install", "--python", sys.executable, "-q")
    how = ("--target", SCATTER, "--no-build-isolation", "--no-deps", "--require-hashes", "-r", PINS)
    subprocess.run([*uv, *how], check=True)
    stamp.write_text(wanted)


def main() -> None:
    """Build, then run the policy's tests in each mode; the first that fails ends it."""
    build()
    for name, (has_scatter, options) in MODES.items():
        print(f"\n== {name}", flush=True)
        paths = [str(SCATTER)] if has_scatter else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS, *options], cwd=ROOT, env=environment)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
