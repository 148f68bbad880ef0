"""Create .venv with all pinned packages and Esper itself: ``make install`` runs this with Python 3.11 or later.

Uses the standard library only, since nothing is installed yet. Installs uv from requirements/uv.txt (by hash), then
all pins, then Esper. The variable TORCH replaces requirements/torch.txt by another build of torch, as pip would name
it: ``make install TORCH="torch==2.9.1"``. The argument ``catalogues`` adds the model libraries that compatibility is
tested with; they fit the pinned torch only.
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
ATTEMPTS = 3  # an interrupted download resumes from the cache
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """End this process when its parent ends, so that no installer outlives its make or terminal."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def inputs_digest() -> str:
    """Digest of everything that decides what is installed."""
    digest = hashlib.sha256(os.environ.get("TORCH", "").encode())
    for path in (*PINS, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(*command: object) -> None:
    """Run one step, and again if it fails, since downloads break. Exits after the last attempt."""
    for attempt in range(1, ATTEMPTS + 1):
        done = subprocess.run([str(c) for c in command], preexec_fn=die_with_parent, check=False)
        if done.returncode == 0:
            return
        print(f"esper: attempt {attempt} of {ATTEMPTS} failed (exit code {done.returncode})", file=sys.stderr)
        time.sleep(2 * attempt)
    sys.exit("esper: installation failed, see the error above; run it again to continue")


def add_catalogues() -> None:
    """Install the model libraries, unless they are installed."""
    digest = hashlib.sha256(CATALOGUES.read_bytes() + inputs_digest().encode()).hexdigest()
    if CATALOGUES_STAMP.exists() and CATALOGUES_STAMP.read_text() == digest:
        return
    if os.environ.get("TORCH"):
        sys.exit("esper: TORCH is set, and the model catalogues fit only the pinned torch; unset it")
    print("esper: installing torchvision, transformers, timm and peft (about 40 MB)", flush=True)
    install = (VENV / "bin" / "uv", "pip", "install", "--python", VENV / "bin" / "python", "-q")
    run(*install, "--require-hashes", "--no-deps", "-r", CATALOGUES)
    CATALOGUES_STAMP.write_text(digest)


def main() -> None:
    """Install whatever is missing or out of date."""
    die_with_parent()
    install_esper()
    if "catalogues" in sys.argv[1:]:
        add_catalogues()


def install_esper() -> None:
    """Create the environment with everything except the model catalogues."""
    if sys.version_info < (3, 11):
        sys.exit(
            f"esper: {sys.executable} is Python {sys.version.split()[0]}; use 3.11 or later (make install PYTHON=...)"
        )
    if STAMP.exists() and STAMP.read_text() == inputs_digest():
        return
    python, torch = VENV / "bin" / "python", os.environ.get("TORCH")
    print("esper: installing into .venv, once: downloads about 3.3 GB, mostly CUDA libraries of torch;")
    print("       takes 6 GB on disk, and half a minute on a fast connection", flush=True)
    if not python.exists():
        run(sys.executable, "-m", "venv", VENV)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes")
    run(*pip, "-r", PINS[0])
    install = (VENV / "bin" / "uv", "pip", "install", "--python", python)
    pins = PINS[2:] if torch else PINS[1:]
    run(*install, "--require-hashes", *(a for path in pins for a in ("-r", path)))
    if torch:
        run(*install, *shlex.split(torch))
    # compat: a .pth file instead of an import hook, so that `import esper` also works beside a clone named esper
    run(*install, "-q", "--no-deps", "--no-build-isolation", "--config-settings", "editable_mode=compat", "-e", ROOT)
    STAMP.write_text(inputs_digest())
    print("esper: ready", flush=True)


if __name__ == "__main__":
    main()
