"""A policy for Tamiyo from nothing: a stack of its own, many small runs, a fit, a verdict on runs that were held out.

Run by ``make train-tamiyo``. It calls the commands that a user would call, one after the other, and prints them.
The policy and its card lie in --into; `esper tamiyo publish` makes it a version of a stack.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from esper.embedded.processes import die_with_parent
from esper.embedded.stack import PUBLIC_FOLDER, EmbeddedStack, inherited_environment

ESPER = Path(sys.executable).parent / "esper"
PREPARE = (("topics", "apply"), ("migrate",))


def main() -> None:
    """Parse, run, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, required=True, help="a new folder for the policy and its card")
    parser.add_argument("--minutes", type=float, default=18.0, help="how long runs are begun")
    parser.add_argument("--runs", type=int, default=1_000, help="so many runs, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cifar", type=Path, help="a folder with CIFAR-10; without it digits only")
    options = parser.parse_args()
    if options.into.exists():
        sys.exit(f"{options.into} is there already: name a new folder, or remove it")
    die_with_parent(signal.SIGTERM)
    folder = Path(tempfile.mkdtemp(prefix="esper-train-", dir="/var/tmp"))
    folder.chmod(PUBLIC_FOLDER)
    try:
        with EmbeddedStack(folder / "stack", report=print) as stack:
            environment = {**os.environ, **inherited_environment(), **stack.environment()}
            cifar = ("--cifar", str(options.cifar)) if options.cifar else ()
            ground = ("tamiyo", "ground", "--runs", str(options.runs), "--minutes", str(options.minutes))
            more = ("--seed", str(options.seed), "--folder", str(folder / "runs"), "--services", *cifar)
            retrain = ("tamiyo", "retrain", "--into", str(options.into.resolve()), "--seed", str(options.seed))
            for command in (*PREPARE, (*ground, *more), retrain):
                print(f"\n$ esper {' '.join(command)}", flush=True)
                done = subprocess.run([str(ESPER), *command], env=environment, check=False)
                if done.returncode:
                    sys.exit(done.returncode)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
