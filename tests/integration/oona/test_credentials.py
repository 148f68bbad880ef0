"""Postgres and S3 with a wrong password or key: one clear line, within seconds, without the secret."""

import secrets
import traceback
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from support.conditions import wait_until
from support.processes.esper_processes import WORKER, cli, log_of, process

from esper.config import PostgresSettings
from esper.embedded.stack import EmbeddedStack
from esper.errors import ConfigError, NotAllowedError
from esper.storage.blobs import BlobStore
from esper.streams.database.connections import connect_pool
from esper.streams.database.migrations import migrate

USER = "guarded"


@pytest.fixture(scope="module")
def password(stack: EmbeddedStack) -> Iterator[str]:
    """The password of a user that the embedded Postgres authenticates, while the module runs."""
    chosen, rules = secrets.token_urlsafe(24), stack.postgres.root / "data" / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"host all {USER} 127.0.0.1/32 scram-sha-256\n{before}")
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        made = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(USER), sql.Literal(chosen))
        connection.execute(made)
        connection.execute("SELECT pg_reload_conf()")
        yield chosen
        rules.write_text(before)
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(USER)))
        connection.execute("SELECT pg_reload_conf()")


def dsn(stack: EmbeddedStack, userinfo: str, database: str = "esper") -> str:
    return f"postgresql://{userinfo}@127.0.0.1:{stack.postgres.port}/{database}"


def all_texts_of(error: BaseException) -> str:
    return "".join((str(error), repr(error), *traceback.format_exception(error)))


async def test_both_postgres_drivers_refuse_a_user_alike(stack: EmbeddedStack, password: str) -> None:
    wrong = secrets.token_urlsafe(24)
    for userinfo in (f"{USER}:{wrong}", USER, f"nobody-{USER}:{wrong}"):
        postgres = PostgresSettings.model_validate({"dsn": dsn(stack, userinfo)})
        name = userinfo.split(":")[0]
        for attempt in (open_pool(postgres), migrate_now(postgres)):
            with pytest.raises(NotAllowedError) as caught:
                await attempt
            assert f"refuses user '{name}'" in str(caught.value)
            assert "\n" not in str(caught.value)
            assert wrong not in all_texts_of(caught.value)
            assert password not in all_texts_of(caught.value)


async def test_missing_right_and_missing_database_differ(stack: EmbeddedStack, password: str) -> None:
    let_in = PostgresSettings.model_validate({"dsn": dsn(stack, f"{USER}:{password}"), "schema_name": "forbidden"})
    with pytest.raises(NotAllowedError, match=f"user '{USER}' lacks a right at Postgres 127.0.0.1"):
        await migrate_now(let_in)
    elsewhere = PostgresSettings.model_validate({"dsn": dsn(stack, f"{USER}:{password}", "nowhere")})
    for attempt in (open_pool(elsewhere), migrate_now(elsewhere)):
        with pytest.raises(ConfigError, match=r"has no database 127\.0\.0\.1:[0-9]+/nowhere"):
            await attempt


async def open_pool(postgres: PostgresSettings) -> None:
    async with connect_pool(postgres):
        pass


async def migrate_now(postgres: PostgresSettings) -> None:
    migrate(postgres)


@pytest.mark.parametrize("command", ["migrate", "projections status", "serve urza", "serve tamiyo", "worker"])
def test_wrong_password_ends_every_command_with_one_line(
    stack: EmbeddedStack, password: str, tmp_path: Path, command: str
) -> None:
    wrong = secrets.token_urlsafe(24)
    env = {"ESPER_POSTGRES__DSN": dsn(stack, f"{USER}:{wrong}")}
    if command == "worker":
        child = process(stack, tmp_path, "worker", *WORKER, **env)
        child.start()
        wait_until(lambda: not child.is_alive, 30, "the worker's end")
        code, printed = child.returncode, log_of(child)
    else:
        code, printed = cli(stack, tmp_path, *command.split(), **env)
    refusals = [line for line in printed.splitlines() if f"refuses user '{USER}'" in line]
    expected = 2 if command == "projections status" else 1  # 1 says that a partition stopped
    assert (code, len(refusals), "Traceback" in printed) == (expected, 1, False), printed
    if command != "worker":  # Faust prints its banner
        assert printed.splitlines() == refusals
    assert wrong not in printed


async def test_wrong_s3_key_is_refused_without_being_shown(stack: EmbeddedStack) -> None:
    s3 = stack.settings().need_s3()
    wrong = secrets.token_urlsafe(24)
    for field in ("secret_key", "access_key"):
        changed = type(s3).model_validate({**stack.sections()["s3"], field: wrong})
        async with BlobStore(changed) as blobs:
            for attempt in (blobs.put(b"bytes"), blobs.get("0" * 64, max_bytes=9), blobs.exists("0" * 64)):
                with pytest.raises(
                    NotAllowedError, match="check ESPER_S3__ACCESS_KEY and ESPER_S3__SECRET_KEY"
                ) as caught:
                    await attempt
                for secret in (wrong, stack.s3.secret_key):
                    assert secret not in all_texts_of(caught.value)
