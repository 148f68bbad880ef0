"""Build the wheel and use it in an empty environment, without torch: run by ``make wheel-check``.

Shows that the packages behind the symlinks, their SQL and schemas are in the wheel, and that a stream
worker starts without torch, from the pins of its image (infra/images/worker.txt) alone.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = Path(sys.executable).parent / "uv"


def run(*command: object, cwd: Path = ROOT) -> str:
    """Run one step and give back what it printed; stop with its output where it fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]}: exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def sources() -> set[str]:
    """Every module, SQL file and schema that the wheel must hold, named as in it."""
    listed = run("git", "ls-files", "esper", "schemas", "streams", "services", "infra/migrations").split()
    kept = [p for p in listed if p.endswith((".py", ".sql", ".json", ".yaml"))]
    renamed = (p.replace("infra/migrations", "streams/migrations_sql") for p in kept)
    return {p if p.startswith("esper/") else f"esper/{p}" for p in renamed}


def main() -> None:
    """Build, look inside, install, run."""
    with tempfile.TemporaryDirectory(prefix="esper-wheel-") as folder:
        room = Path(folder)
        run(UV, "build", "-q", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", room)
        wheel = next(room.glob("*.whl"))
        missing = sources() - set(zipfile.ZipFile(wheel).namelist())
        if missing:
            sys.exit(f"not in the wheel: {sorted(missing)}")
        run(UV, "venv", "-q", "--python", sys.executable, room / "venv")
        python = room / "venv" / "bin" / "python"
        install = (UV, "pip", "install", "-q", "--python", python)
        run(*install, "--require-hashes", "-r", ROOT / "infra" / "images" / "worker.txt")
        run(*install, "--no-deps", wheel)
        shown = run(python.parent / "faust", "-A", "esper.streams", "worker", "--help", cwd=room)
        if "--without-web" not in shown:
            sys.exit(f"not the worker's help:\n{shown}")
        run(python, "-c", "import importlib.util as u; assert u.find_spec('torch') is None", cwd=room)
        print(
            f"wheel-check: {wheel.name} ({wheel.stat().st_size // 1024} KiB) is whole; "
            "`faust -A esper.streams worker --help` runs from it, without torch"
        )


if __name__ == "__main__":
    main()
