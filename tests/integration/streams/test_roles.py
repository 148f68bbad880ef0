"""Postgres roles with real users: the worker writes, the API reads, also after a rebuild."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import httpx
import psycopg
import pytest
from support.conditions import wait_until
from support.events.grown_run_events import LAYERS, grown_run_messages
from support.processes.esper_processes import cli, log_of, running, worker
from support.processes.urza_server import running_urza

from esper.config import PostgresSettings
from esper.embedded.stack import EmbeddedStack
from esper.errors import ConfigError
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.streams.database.roles import DatabaseRole, apply_roles, grant, make_user, members

pytestmark = pytest.mark.slow

RUN = "roles-run"


def dsn_of(stack: EmbeddedStack, user: str) -> str:
    return stack.postgres.dsn.replace("//esper@", f"//{user}@")


def refused(stack: EmbeddedStack, user: str, statement: str) -> str:
    """Postgres' error for a statement that the user may not execute. The embedded server needs no password."""
    with psycopg.connect(dsn_of(stack, user)) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            connection.execute(statement)
        connection.rollback()
    return str(caught.value)


def run_messages(run_id: str) -> list[OonaMessage]:
    """A run with fossilized seeds, and one health report, whose partition the worker must create."""
    signal = HealthSignal(layer_id=LAYERS[0].layer_id, seed_id=0, chunk_id=0, epoch=0, health_score=0.5)
    report = events.LayerHealthMeasured(
        run_id=run_id, incarnation=1, sequence=9_000, step=1, epoch=0, layer_id=LAYERS[0].layer_id, signals=(signal,)
    )
    return [
        *grown_run_messages(run_id),
        OonaMessage.of(report, id=ids.trainer_event_id(run_id, 1, 9_000), source="test"),
    ]


def send(stack: EmbeddedStack, run_id: str) -> None:
    async def now() -> None:
        async with OonaProducer(stack.settings().need_kafka()) as producer:
            await producer.send_batch(run_messages(run_id))

    asyncio.run(now())


@pytest.mark.timeout(300)
def test_roles_bound_worker_and_api_across_a_rebuild(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    stack, postgres = fresh_stack, fresh_stack.settings().need_postgres()
    assert apply_roles(postgres) == [*DatabaseRole]
    assert apply_roles(postgres) == []
    for user, role in (("esper_worker", DatabaseRole.WRITER), ("esper_urza", DatabaseRole.READER)):
        assert make_user(postgres, user, role, None)
        assert not make_user(postgres, user, role, None)
    as_worker = {"ESPER_POSTGRES__DSN": dsn_of(stack, "esper_worker")}
    as_reader = {"ESPER_POSTGRES__DSN": dsn_of(stack, "esper_urza")}
    with ExitStack() as exits:
        working = exits.enter_context(running(worker(stack, tmp_path, **as_worker), "worker.ready"))
        url = exits.enter_context(running_urza(stack, tmp_path, **as_reader))
        api = exits.enter_context(httpx.Client(base_url=url, timeout=30))
        send(stack, RUN)
        wait_until(lambda: len(api.get(f"/runs/{RUN}/reports").json().get("items", ())) == 2, 60, "the run")
        body, key = {"change": "retire", "expected_version": 99}, {"Idempotency-Key": "reader-writes-the-log"}
        assert api.post("/blueprints/noop/changes", json=body, headers=key).json()["verdict"] == "wrong_version"

        owners = (
            "SELECT DISTINCT tableowner FROM pg_tables WHERE tablename LIKE 'health_windows%' AND schemaname = 'esper'"
        )
        windows = "SELECT count(*) FROM esper.health_windows"
        with psycopg.connect(stack.postgres.dsn, autocommit=True) as owner:
            wait_until(lambda: owner.execute(windows).fetchone() == (1,), 60, "the window in the worker's partition")
            assert owner.execute(owners).fetchall() == [("esper_writer",)]
        _assert_privileges_are_bounded(stack)

        code, printed = cli(stack, tmp_path, "projections", "rebuild")
        assert code == 0, printed
        assert api.get(f"/runs/{RUN}/reports").json()["items"]
        _assert_privileges_are_bounded(stack)
        send(stack, "after-the-rebuild")
        wait_until(lambda: api.get("/runs/after-the-rebuild").status_code == 200, 60, "a run after the rebuild")
        assert "partition.stopped" not in log_of(working)


def _assert_privileges_are_bounded(stack: EmbeddedStack) -> None:
    for statement in (
        "INSERT INTO esper.edges VALUES ('x', 'y', 'z')",
        "UPDATE esper.runs SET step = 0",
        "DELETE FROM esper.blueprints",
        "TRUNCATE esper.seeds",
        "CREATE TABLE esper.mine (x integer)",
        "DROP TABLE esper.health_windows",
    ):
        assert "denied" in refused(stack, "esper_urza", statement) or "owner" in refused(stack, "esper_urza", statement)
    for statement in (
        "DROP SCHEMA esper CASCADE",
        "DROP TABLE esper.runs",
        "TRUNCATE esper.seeds",
        "CREATE SCHEMA mine",
        "ALTER SCHEMA esper RENAME TO lost",
    ):
        refused(stack, "esper_worker", statement)


def test_roles_report_missing_schema_and_groups(
    own_database: PostgresSettings, tmp_path: Path, stack: EmbeddedStack
) -> None:
    with pytest.raises(ConfigError, match="esper roles apply"):
        make_user(own_database, "somebody", DatabaseRole.READER, None)
    with pytest.raises(ConfigError, match="esper migrate"):
        apply_roles(own_database.model_copy(update={"schema_name": "nowhere"}))
    assert members(own_database) == []
    with psycopg.connect(own_database.dsn.get_secret_value()) as connection:
        grant(connection, own_database.schema_name)  # nothing, without the roles
    code, printed = cli(stack, tmp_path, "roles", "token", "--role", "reader")
    assert code == 0
    assert "ESPER_URZA__READER_TOKENS_SHA256=" in printed
