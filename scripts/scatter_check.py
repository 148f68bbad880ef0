"""Run the tests of Tamiyo's policy with torch-geometric alone, with torch-scatter alone, and with both.

Compiles torch-scatter once for the torch in .venv, into the folder .scatter; this takes a C++ compiler and about
7 minutes. ``make test-scatter`` runs this script.
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
    """Compile torch-scatter, unless it is already compiled for this torch."""
    stamp, wanted = SCATTER / "built.txt", f"{PINS.read_text()}torch {version('torch')}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if shutil.which("c++") is None and shutil.which("g++") is None:
        sys.exit("torch-scatter must be compiled, and there is no C++ compiler; install g++ (apt-get install g++)")
    print("compiling torch-scatter once; takes about 7 minutes", flush=True)
    uv = (Path(sys.executable).parent / "uv", "pip", "install", "--python", sys.executable, "-q")
    how = ("--target", SCATTER, "--no-build-isolation", "--no-deps", "--require-hashes", "-r", PINS)
    subprocess.run([*uv, *how], check=True)
    stamp.write_text(wanted)


def main() -> None:
    """Build, then run the tests in each mode until one fails."""
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
