"""Write requirements/*.txt: exact pins with hashes, without the address of an index.

``make lock`` runs this after a change of the ranges in pyproject.toml. torch has a separate file, so that users can
install the build that fits their machine (see README). The model catalogues, which only ``make compat`` and
``make bench-kasmina`` need, and the tools of ``make docs`` have one each. The images in infra/images use the same pins.
"""

import re
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
IMAGES = REQUIREMENTS.parent / "infra" / "images"
MIN_AGE = "14 days"  # newer versions wait for the next lock: a bad release is usually withdrawn by then
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
    """Resolve into ``output``; keep its pins that still fit."""
    subprocess.run([*COMPILE, *PLAIN, *arguments, "-o", str(output)], check=True)


def names_in(path: Path) -> set[str]:
    """Names of the packages that a requirements file pins."""
    return set(re.findall(r"^([a-z0-9._-]+)==", path.read_text(encoding="utf-8"), re.M))


def torch_packages(torch: Path) -> list[str]:
    """Packages that only torch needs: the accelerator's libraries and compiler."""
    prefixes = ("torch", "nvidia-", "cuda-", "triton")
    return sorted(name for name in names_in(torch) if name.startswith(prefixes))


def main() -> None:
    """Lock torch, then Esper to fit it, then the model catalogues, the tools of the docs and the images to fit."""
    torch, esper = REQUIREMENTS / "torch.txt", REQUIREMENTS / "esper.txt"
    upgrade = ("--upgrade",) if "--upgrade" in sys.argv[1:] else ()
    compile_pins(REQUIREMENTS / "uv.txt", str(REQUIREMENTS / "uv.in"), *upgrade)
    compile_pins(torch, str(REQUIREMENTS / "torch.in"), *upgrade)
    scatter = (str(REQUIREMENTS / "scatter.in"), "--no-deps", "--no-build-isolation")  # published as source only
    compile_pins(REQUIREMENTS / "scatter.txt", *scatter, *upgrade)
    left_out = [a for name in torch_packages(torch) for a in ("--no-emit-package", name)]
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
    already_pinned = [a for name in sorted(names_in(torch) | names_in(esper)) for a in ("--no-emit-package", name)]
    for extra in ("catalogues", "docs"):
        compile_pins(
            REQUIREMENTS / f"{extra}.txt",
            "pyproject.toml",
            "--extra",
            extra,
            "-c",
            str(torch),
            "-c",
            str(esper),
            *already_pinned,
            *upgrade,
        )
    pinned = ("-c", str(torch), "-c", str(esper))
    without_torch = ("--override", str(IMAGES / "worker.override"))
    compile_pins(IMAGES / "worker.txt", "pyproject.toml", "--extra", "streams", *pinned, *without_torch)
    services = str(IMAGES / "services.in")
    compile_pins(IMAGES / "services.txt", "pyproject.toml", services, "--extra", "services", *pinned, *left_out)


if __name__ == "__main__":
    main()
