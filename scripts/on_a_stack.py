"""Run `esper` commands one after the other on a stack of their own, which is gone when they end.

``python scripts/on_a_stack.py "tamiyo ground --services --folder {folder}" "tamiyo retrain --into policy"``: {folder}
is a new folder that goes with the stack. It stops at the first command that fails, with its exit code.
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
from esper.embedded.stack import PUBLIC_FOLDER, EmbeddedStack, inherited_environment

ESPER = Path(sys.executable).parent / "esper"
PREPARE = ("topics apply", "migrate")


def main() -> None:
    """Parse, run, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="+", help="as one would write them behind `esper`, each one argument")
    parser.add_argument("--new", type=Path, help="a folder that the commands make: it must not be there yet")
    options = parser.parse_args()
    if options.new is not None and options.new.exists():
        sys.exit(f"{options.new} is there already: name a new folder, or remove it")
    die_with_parent(signal.SIGTERM)
    folder = Path(tempfile.mkdtemp(prefix="esper-stack-", dir="/var/tmp"))
    folder.chmod(PUBLIC_FOLDER)
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
