"""The embedded stack: lifetime of its processes, restarts with data, two stacks at once; up, status, down."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest
from support.conditions import wait_until
from support.processes.esper_processes import alive
from support.stacks import running_stack

from esper.embedded import jars
from esper.embedded.embedded_server import EmbeddedServer
from esper.embedded.postgres import EmbeddedPostgres
from esper.embedded.stack import EmbeddedStack
from esper.errors import EsperError

HOLD = """
import sys, signal
from pathlib import Path
from esper.embedded.stack import EmbeddedStack
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT
with EmbeddedStack(Path(sys.argv[1])) as stack:
    print("pids", *(part.pid for part in stack.parts), flush=True)
    signal.pause()
"""


def family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


@pytest.fixture
def public_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="esper-test-", dir="/var/tmp"))
    folder.chmod(0o711)
    return folder


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_processes_die_with_their_owner(public_folder: Path, sig: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(public_folder / "stack")], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    while not owner.stdout.readline().startswith("pids"):
        assert owner.poll() is None
    processes = family(owner.pid)
    assert len(processes) > 6, "Kafka, S3, Postgres with its own children"
    owner.send_signal(sig)
    owner.wait(60)
    owner.stdout.close()
    wait_until(lambda: not alive(processes), 60, "their end")


def test_kill_during_start_leaves_no_processes(public_folder: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(public_folder / "stack")], stdout=subprocess.DEVNULL)
    wait_until(lambda: len(family(owner.pid)) > 1, 60, "the first child")
    processes = family(owner.pid)
    owner.kill()
    owner.wait(30)
    wait_until(lambda: not alive(processes), 60, "their end")


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_two_stacks_run_at_once_and_keep_data(stack: EmbeddedStack) -> None:
    with running_stack() as other:
        assert not {p.port for p in stack.parts} & {p.port for p in other.parts}
        ports = [p.port for p in other.parts]
        with psycopg.connect(other.postgres.dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept (n integer)")
        for part in other.parts:
            part.kill()
            assert not part.is_alive
            part.start()
        assert [p.port for p in other.parts] == ports
        with psycopg.connect(other.postgres.dsn) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_postgres_start_completes_an_interrupted_one(public_folder: Path) -> None:
    """A kill during initdb leaves a partial folder; a kill before createdb leaves a server without the database."""
    partial = public_folder / "postgres" / "data.partial"
    partial.mkdir(parents=True)
    (partial / "PG_VERSION").write_text("18\n")
    postgres = EmbeddedPostgres(public_folder / "postgres")
    try:
        EmbeddedServer.start(postgres)
        with psycopg.connect(postgres.dsn_of("postgres")) as connection:
            names = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
        assert names == {"postgres", "template0", "template1"}
        postgres.kill()
        for _n in range(2):
            postgres.start()
            with psycopg.connect(postgres.dsn) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
            postgres.stop()
    finally:
        postgres.stop()


def test_altered_jar_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(jars.committed_sums()))
    monkeypatch.setattr(jars, "committed_sums", lambda: {name: "0" * 64})
    with pytest.raises(EsperError, match="SHA-256 0000"):
        jars.kafka_jars(lambda _line: None)


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_up_status_down(public_folder: Path) -> None:
    esper = str(Path(sys.executable).parent / "esper")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ESPER_")}
    environment["ESPER_STATE_DIR"] = str(public_folder / "state")

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([esper, *arguments], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run("status")[0] == 1
    code, printed = run("up")
    assert code == 0, printed
    try:
        assert printed.count("ready") == 3
        assert "already running" in run("up")[1]
        assert run("status")[0] == 0
        code, printed = run("topics", "list")
        assert (code, printed.count("present")) == (0, 20), printed
        assert (public_folder / "state" / "stack.json").stat().st_mode & 0o077 == 0
        published = run("tamiyo", "publish")
        assert published[0] == 0, published
        assert run("down") == (0, "stopped\n")
        assert run("up")[0] == 0, "it does not start with its old data"
        code, printed = run("events", "tail", "control.tamiyo.policies", "--from-beginning")
        assert (code, "policy.trained" in printed) == (0, True), printed
    finally:
        assert run("down") == (0, "stopped\n")
    assert run("down") == (0, "the stack is not running\n")
    assert "start the embedded stack with `esper up`" in run("topics", "list")[1]
