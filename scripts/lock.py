"""Write requirements/*.txt: exact pins with hashes and no index address, torch apart.

Run with ``make lock`` after a change of the ranges in pyproject.toml. torch has a file of
its own so that a user can bring the build that fits the machine (see README); so have the
catalogues of models that only ``make compat`` and ``make bench-kasmina`` need. The images in infra/images get
what they need from the same pins.
"""

import re
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
IMAGES = REQUIREMENTS.parent / "infra" / "images"
MIN_AGE = "14 days"  # versions younger than this are left for the next lock: time to be found bad
COMPILE = ("uv", "pip", "compile", "-q", "--universal", "--python-version", "3.11", "--generate-hashes")
PLAIN = (
    "--exclude-newer",
    MIN_AGE,
    "--no-header",
    "--no-annotate",
    "--no-emit-index-url",
    "--no-emit-find-links",
)


def compile_pins(output: Path, *arguments: str) -> None:
    """Resolve into ``output``, keeping the pins that it already has where they still fit."""
    subprocess.run([*COMPILE, *PLAIN, *arguments, "-o", str(output)], check=True)


def names_in(path: Path) -> set[str]:
    """The packages that a requirements file pins."""
    return set(re.findall(r"^([a-z0-9._-]+)==", path.read_text(encoding="utf-8"), re.M))


def only_for_torch(torch: Path) -> list[str]:
    """Packages that torch alone brings: the accelerator's libraries and its compiler."""
    prefixes = ("torch", "nvidia-", "cuda-", "triton")
    return sorted(name for name in names_in(torch) if name.startswith(prefixes))


def main() -> None:
    """Lock torch first, then Esper to fit it, then the catalogues of models and the images to fit both."""
    torch, esper = REQUIREMENTS / "torch.txt", REQUIREMENTS / "esper.txt"
    upgrade = ("--upgrade",) if "--upgrade" in sys.argv[1:] else ()
    compile_pins(REQUIREMENTS / "uv.txt", str(REQUIREMENTS / "uv.in"), *upgrade)
    compile_pins(torch, str(REQUIREMENTS / "torch.in"), *upgrade)
    scatter = (str(REQUIREMENTS / "scatter.in"), "--no-deps", "--no-build-isolation")  # only its source is published
    compile_pins(REQUIREMENTS / "scatter.txt", *scatter, *upgrade)
    left_out = [a for name in only_for_torch(torch) for a in ("--no-emit-package", name)]
    compile_pins(
        esper,
        "pyproject.toml",
        "--extra",
        "dev",
        "-c",
        str(torch),
        "-c",
        str(REQUIREMENTS / "constraints.txt"),
        *left_out,
        *upgrade,
    )
    beside = [a for name in sorted(names_in(torch) | names_in(esper)) for a in ("--no-emit-package", name)]
    compile_pins(
        REQUIREMENTS / "catalogues.txt",
        "pyproject.toml",
        "--extra",
        "catalogues",
        "-c",
        str(torch),
        "-c",
        str(esper),
        *beside,
        *upgrade,
    )
    pinned = ("-c", str(torch), "-c", str(esper))
    without_torch = ("--override", str(IMAGES / "worker.override"))
    compile_pins(IMAGES / "worker.txt", "pyproject.toml", "--extra", "streams", *pinned, *without_torch)
    more = str(IMAGES / "services.in")
    compile_pins(IMAGES / "services.txt", "pyproject.toml", more, "--extra", "services", *pinned, *left_out)


if __name__ == "__main__":
    main()
