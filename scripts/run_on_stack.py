"""Run `esper` commands one after the other on a temporary stack, which is removed when they end.

``python scripts/run_on_stack.py "tamiyo corpus --services --folder {folder}" "tamiyo retrain --into policy"``:
{folder} stands for a temporary folder. The first command that fails ends the script with its exit code.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from esper.embedded.processes import die_with_parent
from esper.embedded.stack import FOLDER_MODE, EmbeddedStack, inherited_environment

ESPER = Path(sys.executable).parent / "esper"
PREPARE = ("topics apply", "migrate")


def main() -> None:
    """Start a stack, run the commands, and remove the stack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="+", help="arguments of `esper`, each command quoted as one word")
    parser.add_argument("--new", type=Path, help="output folder of the commands; it must not exist yet")
    options = parser.parse_args()
    if options.new is not None and options.new.exists():
        sys.exit(f"{options.new} already exists; name a new folder, or remove it")
    die_with_parent(signal.SIGTERM)
    folder = Path(tempfile.mkdtemp(prefix="esper-stack-", dir="/var/tmp"))
    folder.chmod(FOLDER_MODE)
    try:
        with EmbeddedStack(folder / "stack", report=print) as stack:
            environment = {**os.environ, **inherited_environment(), **stack.environment()}
            for command in (*PREPARE, *options.commands):
                print(f"\n$ esper {command}", flush=True)
                words = shlex.split(command.replace("{folder}", str(folder / "runs")))
                done = subprocess.run([str(ESPER), *words], env=environment, check=False)
                if done.returncode:
                    sys.exit(done.returncode)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
