"""Make .venv with everything pinned: run by ``make install``, with any Python 3.11 or later.

Standard library only, since nothing is installed yet. Installs uv from requirements/uv.txt
(by hash), then all pins, then Esper itself. TORCH names another build of torch, in the words
of an installer: ``make install TORCH="torch==2.9.1"``; then requirements/torch.txt is left out.
With the argument ``catalogues`` it adds the libraries of models that compatibility is tried on;
they fit the pinned torch only.
"""

import ctypes
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.sha256"
CATALOGUES = ROOT / "requirements" / "catalogues.txt"
CATALOGUES_STAMP = VENV / "catalogues.sha256"
PINS = [ROOT / "requirements" / name for name in ("uv.txt", "torch.txt", "esper.txt")]
ATTEMPTS = 3  # a download that breaks off is resumed from the cache
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """No installer outlives the make, or the terminal, that started it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wanted() -> str:
    """A digest of all that decides what is installed."""
    digest = hashlib.sha256(os.environ.get("TORCH", "").encode())
    for path in (*PINS, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(*command: object) -> None:
    """Run one step; a broken download is tried again, anything else is said and ends the set-up."""
    for attempt in range(1, ATTEMPTS + 1):
        done = subprocess.run([str(c) for c in command], preexec_fn=die_with_parent, check=False)
        if done.returncode == 0:
            return
        print(f"esper: attempt {attempt} of {ATTEMPTS} failed ({done.returncode})", file=sys.stderr)
        time.sleep(2 * attempt)
    sys.exit("esper: the set-up could not be finished; what failed is above. Run it again to go on.")


def add_catalogues() -> None:
    """Install the libraries of models beside what is there."""
    digest = hashlib.sha256(CATALOGUES.read_bytes() + wanted().encode()).hexdigest()
    if CATALOGUES_STAMP.exists() and CATALOGUES_STAMP.read_text() == digest:
        return
    if os.environ.get("TORCH"):
        sys.exit("esper: the catalogues fit the pinned torch only: leave TORCH out")
    print("esper: adding torchvision, transformers, timm and peft (about 40 MB)", flush=True)
    install = (VENV / "bin" / "uv", "pip", "install", "--python", VENV / "bin" / "python", "-q")
    run(*install, "--require-hashes", "--no-deps", "-r", CATALOGUES)
    CATALOGUES_STAMP.write_text(digest)


def main() -> None:
    """Install what is not installed yet."""
    die_with_parent()
    install_esper()
    if "catalogues" in sys.argv[1:]:
        add_catalogues()


def install_esper() -> None:
    """The environment that everything but the catalogues runs in."""
    if sys.version_info < (3, 11):
        sys.exit(f"esper needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}")
    if STAMP.exists() and STAMP.read_text() == wanted():
        return
    python, torch = VENV / "bin" / "python", os.environ.get("TORCH")
    print("esper: setting up .venv: about 3.3 GB to download (most of it torch's CUDA libraries),")
    print("       6 GB on disk; half a minute on a fast line, and once only.", flush=True)
    if not python.exists():
        run(sys.executable, "-m", "venv", VENV)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes")
    run(*pip, "-r", PINS[0])
    install = (VENV / "bin" / "uv", "pip", "install", "--python", python)
    pins = PINS[2:] if torch else PINS[1:]
    run(*install, "--require-hashes", *(a for path in pins for a in ("-r", path)))
    if torch:
        run(*install, *shlex.split(torch))
    run(*install, "-q", "--no-deps", "--no-build-isolation", "-e", ROOT)
    STAMP.write_text(wanted())
    print("esper: ready", flush=True)


if __name__ == "__main__":
    main()
