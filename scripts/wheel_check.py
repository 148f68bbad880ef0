"""Build the wheel and check it in an empty environment without torch: ``make wheel-check`` runs this script.

The wheel must hold the packages behind the symlinks with their SQL and schemas. A stream worker must start from it
with nothing but the pins of its image (infra/images/worker.txt).
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = Path(sys.executable).parent / "uv"


def run(*command: object, cwd: Path = ROOT) -> str:
    """Run one step and return its output. Exits with the output if the step fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]}: exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def sources() -> set[str]:
    """Every module, SQL file and schema that the wheel must hold, by its name in the wheel."""
    listed = run("git", "ls-files", "esper", "schemas", "streams", "services", "infra/migrations").split()
    kept = [p for p in listed if p.endswith((".py", ".sql", ".json", ".yaml"))]
    renamed = (p.replace("infra/migrations", "streams/migrations_sql") for p in kept)
    return {p if p.startswith("esper/") else f"esper/{p}" for p in renamed}


def main() -> None:
    """Build the wheel, check its files, install it and run the worker's command line."""
    with tempfile.TemporaryDirectory(prefix="esper-wheel-") as folder:
        temporary = Path(folder)
        run(UV, "build", "-q", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", temporary)
        wheel = next(temporary.glob("*.whl"))
        missing = sources() - set(zipfile.ZipFile(wheel).namelist())
        if missing:
            sys.exit(f"missing from the wheel: {sorted(missing)}; check the package data in pyproject.toml")
        run(UV, "venv", "-q", "--python", sys.executable, temporary / "venv")
        python = temporary / "venv" / "bin" / "python"
        install = (UV, "pip", "install", "-q", "--python", python)
        run(*install, "--require-hashes", "-r", ROOT / "infra" / "images" / "worker.txt")
        run(*install, "--no-deps", wheel)
        shown = run(python.parent / "faust", "-A", "esper.streams", "worker", "--help", cwd=temporary)
        if "--without-web" not in shown:
            sys.exit(f"the worker's help lacks --without-web:\n{shown}")
        run(python, "-c", "import importlib.util as u; assert u.find_spec('torch') is None", cwd=temporary)
        print(
            f"wheel-check: {wheel.name} ({wheel.stat().st_size // 1024} KiB) is complete; "
            "`faust -A esper.streams worker --help` runs from it without torch"
        )


if __name__ == "__main__":
    main()
