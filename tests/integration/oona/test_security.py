"""The event bus with SCRAM, TLS and ACLs on a real broker; no secret is ever shown."""

import asyncio
import logging
import secrets
import subprocess
import time
import traceback
import uuid
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import TopicAuthorizationFailedError
from pydantic import SecretStr
from support.conditions import wait_until, wait_until_async
from support.processes.esper_processes import SCRIPTS, WORKER, cli, command_lines, log_of, process, running
from support.processes.secure_kafka import SecureKafka, foreign_authority, secure_kafka

from esper.config import KafkaSettings, PostgresSettings
from esper.embedded.stack import EmbeddedStack, inherited_environment
from esper.errors import EsperError, NotAllowedError
from esper.oona.admin.acls import Acl, AclPlan, AclState, apply_acls, list_acls
from esper.oona.admin.read_access import verify_group, verify_readable
from esper.oona.admin.rights import Operation, Service, default_principals, rights
from esper.oona.admin.scram_users import set_passwords
from esper.oona.admin.topics import apply_topics, list_topics, verify_topics
from esper.oona.client_options import client_options, started
from esper.oona.log_reader import read_range
from esper.oona.producer import OonaProducer
from esper.schemas import ids
from esper.schemas.assets import LayerNode
from esper.schemas.events import DecisionMade, RunStarted
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import DECISIONS, RUNS, TELEMETRY, all_topics

GROUP = "esper-streams"
PLAN = AclPlan.of(default_principals(), GROUP)
REFUSED_WITHIN_S = 30.0
LAYER = LayerNode(layer_id="fc1", kind="linear", num_features=8, num_parameters=72, num_seeds=2)


def user(service: Service) -> str:
    return f"esper-{service}"


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    with secure_kafka(tmp_path_factory.mktemp("secure")) as kafka:
        kafka.add_users("stranger", *(user(s) for s in Service))

        async def prepare() -> None:
            await apply_topics(kafka.administrator)
            made = await apply_acls(kafka.administrator, PLAN)
            assert {s.state for s in made} == {AclState.CREATED}

        with ThreadPoolExecutor(1) as pool:  # a loop runs in this thread already
            pool.submit(asyncio.run, prepare()).result()
        yield kafka


def run_started(run_id: str) -> OonaMessage:
    body = RunStarted(
        run_id=run_id,
        incarnation=1,
        sequence=0,
        step=0,
        model="Net",
        layers=(LAYER,),
        edges=(),
        boundary_steps=10,
        command_offset=0,
    )
    return OonaMessage.of(body, id=ids.trainer_event_id(run_id, 1, 0), source="test")


def all_texts_of(error: BaseException) -> str:
    """Every text that an error can print."""
    return "".join((str(error), repr(error), *traceback.format_exception(error)))


# -- let in ---------------------------------------------------------------------------------


async def test_event_round_trip_with_scram_over_tls(secure: SecureKafka, run_id: str) -> None:
    sent = run_started(run_id)
    async with OonaProducer(secure.settings(user(Service.TRAINER))) as producer:
        position = await producer.send(sent)
    reader = secure.settings(user(Service.OPERATOR))
    found = [r async for r in read_range(reader, RUNS, partition=position.partition)]
    assert [r.decode() for r in found if r.position == position] == [sent]


@pytest.mark.parametrize("service", Service)
async def test_service_sees_all_topics_and_only_the_worker_its_group(secure: SecureKafka, service: Service) -> None:
    kafka = secure.settings(user(service))
    await verify_topics(kafka)
    if service is Service.WORKER:
        await verify_group(kafka, GROUP)
    else:
        with pytest.raises(NotAllowedError, match=f"User:esper-{service} lacks a right on consumer group {GROUP}"):
            await verify_group(kafka, GROUP)


async def test_password_change_needs_no_restart(secure: SecureKafka) -> None:
    secure.add_users("rotated")
    await wait_until_async(lambda: is_let_in(secure.settings("rotated")), 10, "the new user's entry")
    old = secure.settings("rotated")
    secure.add_users("rotated")
    await wait_until_async(lambda: is_let_in(secure.settings("rotated")), 10, "the new password's turn")
    assert not await is_let_in(old)


async def is_let_in(kafka: KafkaSettings) -> bool:
    return await is_allowed(list_topics(kafka), "refuses user '")


# -- refused --------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong password": ({"password": "{secret}"}, "refuses user 'esper-trainer' (SCRAM-SHA-512)"),
    "unknown user": ({"username": "nobody", "password": "{secret}"}, "refuses user 'nobody' (SCRAM-SHA-512)"),
    "mechanism not enabled": ({"mechanism": "SCRAM-SHA-256"}, "has not enabled SCRAM-SHA-256"),
    "authority not trusted": ({"ca_file": "{foreign}"}, "is not signed by the authority in"),
    "plaintext against TLS": (
        {"protocol": "PLAINTEXT"},
        "uses TLS, but ESPER_KAFKA__SECURITY__PROTOCOL is PLAINTEXT",
    ),
    "password in the clear against TLS": ({"protocol": "SASL_PLAINTEXT"}, "is SASL_PLAINTEXT: set SASL_SSL"),
    "no user": ({"protocol": "SSL"}, "requires a user (SCRAM-SHA-512)"),
    "another host's certificate": ({"host": "localhost"}, "is for another host"),
}


@pytest.mark.parametrize(("changed", "expected"), REFUSALS.values(), ids=REFUSALS.keys())
async def test_refusal_is_one_clear_error_within_seconds(
    secure: SecureKafka, changed: dict[str, Any], expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = secrets.token_urlsafe(24)
    texts = {"{secret}": secret, "{foreign}": foreign_authority(tmp_path)}
    kafka = secure.settings(user(Service.TRAINER), **{k: texts.get(v, v) for k, v in changed.items() if k != "host"})
    if "host" in changed:
        servers = kafka.bootstrap_servers.replace("127.0.0.1", changed["host"])
        kafka = kafka.model_copy(update={"bootstrap_servers": servers})
    before = time.monotonic()
    with pytest.raises(NotAllowedError) as produced:
        async with OonaProducer(kafka):
            pass
    with pytest.raises(NotAllowedError) as listed:
        await list_topics(kafka)
    with pytest.raises(NotAllowedError) as read:
        _never = [r async for r in read_range(kafka, RUNS)]
    assert time.monotonic() - before < REFUSED_WITHIN_S
    for caught in (produced, listed, read):
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        shown = all_texts_of(caught.value) + caplog.text + repr(kafka)
        assert secret not in shown
        assert secure.passwords[user(Service.TRAINER)] not in shown


async def test_tls_client_reports_a_plaintext_broker(stack: EmbeddedStack, secure: SecureKafka) -> None:
    here = {"bootstrap_servers": stack.kafka.bootstrap_servers}
    for protocol, expected in (
        ("SSL", "does not speak TLS"),
        ("SASL_SSL", "does not speak TLS"),
        ("SASL_PLAINTEXT", "requires no user"),
    ):
        security = {**secure.section(user(Service.TRAINER)), "protocol": protocol}
        with pytest.raises(NotAllowedError, match=expected):
            await list_topics(KafkaSettings.model_validate({**here, "security": security}))


async def test_client_reports_a_required_certificate(secure: SecureKafka) -> None:
    known = secure.administrator
    without = known.model_copy(update={"security": known.security.model_copy(update={"cert_file": None})})
    with pytest.raises(NotAllowedError, match="requires a client certificate"):
        await list_topics(without)


def test_trainer_is_refused_before_its_run_begins(secure: SecureKafka, stack: EmbeddedStack, tmp_path: Path) -> None:
    import torch

    import esper
    from esper.connection.settings import LinkOptions

    model = esper.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), seeds_per_layer=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = LinkOptions.model_validate({"folder": tmp_path})
    for kafka, expected in (
        (secure.settings("stranger"), "User:stranger has no right to see"),
        (secure.settings(user(Service.URZA)), "User:esper-urza lacks a right on topic control.kasmina"),
        (secure.settings(user(Service.TRAINER), password="wrong"), "refuses user 'esper-trainer'"),
    ):
        settings = stack.settings().model_copy(update={"kafka": kafka})
        before = time.monotonic()
        with (
            pytest.raises(NotAllowedError, match=expected),
            esper.connect(model, optimizer, settings=settings, options=options),
        ):
            pass
        assert time.monotonic() - before < REFUSED_WITHIN_S


# -- rights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("service", Service)
async def test_broker_enforces_exactly_the_listed_rights(secure: SecureKafka, service: Service) -> None:
    kafka, names = secure.settings(user(service)), [t.name for t in all_topics()]
    may = {
        Operation.READ: await asyncio.gather(*(may_read(kafka, name) for name in names)),
        Operation.WRITE: await asyncio.gather(*(may_write(kafka, name) for name in names)),
    }
    for operation, answers in may.items():
        allowed = {name for name, answer in zip(names, answers, strict=True) if answer}
        assert allowed == {
            r.name for r in rights(GROUP) if (r.service, r.operation) == (service, operation) and r.name in names
        }


async def may_read(kafka: KafkaSettings, topic: str) -> bool:
    return await is_allowed(verify_readable(kafka, [topic]), f"lacks a right on topic {topic}")


async def may_write(kafka: KafkaSettings, topic: str) -> bool:
    # not idempotent: a refused batch would end an idempotent producer's sequence
    options = client_options(kafka)
    async with started(AIOKafkaProducer(**options, acks="all"), kafka, topics=[topic]) as producer:
        try:
            await producer.send_and_wait(topic, b"not an event", key=b"rights")
        except TopicAuthorizationFailedError:
            return False
        return True


async def is_allowed(attempt: Awaitable[object], expected: str) -> bool:
    try:
        await attempt
    except NotAllowedError as error:
        refusal = str(error)
    else:
        return True
    assert expected in refusal
    return False


async def test_broker_accepts_decisions_from_tamiyo_only(secure: SecureKafka, run_id: str) -> None:
    decision = OonaMessage.of(
        DecisionMade(
            run_id=run_id,
            incarnation=1,
            boundary=1,
            step=10,
            action="wait",
            probability=1.0,
            policy_id="wait",
            policy_version=1,
            reason="nothing to do",
            view_digest="0" * 64,
        ),
        id=uuid.uuid4(),
        source="test",
    )
    async with OonaProducer(secure.settings(user(Service.TAMIYO))) as producer:
        assert (await producer.send(decision)).topic == DECISIONS.name
    async with OonaProducer(secure.settings(user(Service.TRAINER))) as producer:
        with pytest.raises(NotAllowedError, match=f"lacks a right on topic {DECISIONS.name}.*esper acls apply"):
            await producer.send(decision)


async def test_unknown_user_sees_nothing_and_gets_a_clear_error(secure: SecureKafka) -> None:
    kafka = secure.settings("stranger")
    for attempt in (verify_topics(kafka), apply_topics(kafka)):
        with pytest.raises(NotAllowedError, match="User:stranger has no right to see"):
            await attempt
    password = {"stranger": SecretStr(secrets.token_urlsafe(24))}
    for attempt in (list_acls(kafka, PLAN), apply_acls(kafka, PLAN), set_passwords(kafka, password)):
        with pytest.raises(NotAllowedError, match="User:stranger may not see or change ACLs and users"):
            await attempt


async def test_apply_acls_removes_extra_acls_only_with_prune(secure: SecureKafka) -> None:
    admin = secure.administrator
    mine = Acl("User:stranger", "topic", TELEMETRY.name, "read")
    theirs = Acl("User:other", "topic", "elsewhere.", "read", pattern="prefixed")
    grabbing = Acl("User:other", "topic", "control.", "write", pattern="prefixed")
    await apply_acls(admin, AclPlan(frozenset({mine, theirs, grabbing}), frozenset()))
    states = {s.acl: s.state for s in await apply_acls(admin, PLAN)}
    assert (states[mine], states[grabbing]) == (AclState.EXTRA, AclState.EXTRA)
    assert theirs not in states, "it concerns nothing of Esper"
    states = {s.acl: s.state for s in await apply_acls(admin, PLAN, prune=True)}
    assert (states[mine], states[grabbing]) == (AclState.REMOVED, AclState.EXTRA)
    left = {s.acl: s.state for s in await list_acls(admin, AclPlan(frozenset({theirs}), frozenset({"User:other"})))}
    assert left == {theirs: AclState.PRESENT, grabbing: AclState.EXTRA}


async def test_apply_acls_reports_a_broker_without_authorizer(stack: EmbeddedStack) -> None:
    with pytest.raises(EsperError, match="has no authorizer, so every client may do everything"):
        await apply_acls(stack.settings().need_kafka(), PLAN)


# -- whole processes ------------------------------------------------------------------------


@pytest.fixture
def database(stack: EmbeddedStack, own_database: PostgresSettings) -> dict[str, str]:
    return {"ESPER_POSTGRES__DSN": own_database.dsn.get_secret_value()}


def all_secrets(stack: EmbeddedStack, secure: SecureKafka, *more: str) -> tuple[str, ...]:
    return (*secure.passwords.values(), stack.s3.secret_key, *more)


def logs_in(*folders: Path) -> str:
    logs = (path for folder in folders for path in folder.rglob("*.log"))
    return "\n".join(path.read_text(errors="replace") for path in logs)


def test_worker_runs_with_its_credentials_and_shows_no_secret(
    stack: EmbeddedStack, secure: SecureKafka, database: dict[str, str], tmp_path: Path, run_id: str
) -> None:
    env = {**secure.environment(user(Service.WORKER)), **database, "ESPER_LOGGING__LEVEL": "DEBUG"}
    with running(process(stack, tmp_path, "worker", *WORKER, **env), "worker.ready"):

        async def send() -> None:
            async with OonaProducer(secure.settings(user(Service.TRAINER))) as producer:
                await producer.send(run_started(run_id))

        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, send()).result()
        with psycopg.connect(database["ESPER_POSTGRES__DSN"], autocommit=True) as connection:
            query = "SELECT 1 FROM esper.runs WHERE run_id = %s"
            wait_until(lambda: connection.execute(query, (run_id,)).fetchone(), 30, "the run's row")
        lines = command_lines()
    shown = lines + logs_in(tmp_path, stack.root, secure.root)
    assert "worker.ready" in shown
    assert str(secure.broker.root) in lines, "the broker's command line is among them"
    assert not [s for s in all_secrets(stack, secure) if s in shown]


@pytest.mark.parametrize("command", ["worker", "topics", "urza"])
def test_wrong_password_ends_every_command_with_one_line(
    stack: EmbeddedStack, secure: SecureKafka, database: dict[str, str], tmp_path: Path, command: str
) -> None:
    secret = secrets.token_urlsafe(24)
    env = {**secure.environment(user(Service.WORKER), password=secret), **database}
    if command == "worker":
        child = process(stack, tmp_path, "worker", *WORKER, **env)
        child.start()
        wait_until(lambda: not child.is_alive, REFUSED_WITHIN_S + 15, "the worker's end")
        code, printed = child.returncode, log_of(child)
    else:
        words = ("serve", command) if command == "urza" else (command, "list")
        code, printed = cli(stack, tmp_path, *words, **env)
    refusals = [line for line in printed.splitlines() if "refuses user 'esper-worker' (SCRAM-SHA-512)" in line]
    assert (code, len(refusals)) == (1, 1), printed
    assert "Traceback" not in printed
    if command != "worker":  # Faust prints its banner
        assert printed.splitlines() == refusals
    assert not [s for s in all_secrets(stack, secure, secret) if s in printed + command_lines()]


def test_worker_without_its_ca_file_ends_with_one_line(
    stack: EmbeddedStack, secure: SecureKafka, tmp_path: Path
) -> None:
    env = secure.environment(user(Service.WORKER), ca_file=tmp_path / "gone.pem")
    child = process(stack, tmp_path, "worker", *WORKER, **env)
    child.start()
    wait_until(lambda: not child.is_alive, REFUSED_WITHIN_S + 15, "the worker's end")
    (line,) = log_of(child).splitlines()
    assert "a certificate file cannot be used" in line
    assert (child.returncode, str(tmp_path / "gone.pem") in line) == (1, True)


@pytest.fixture
def as_administrator(secure: SecureKafka) -> dict[str, str]:
    secured = secure.administrator.security
    return {
        "ESPER_KAFKA__BOOTSTRAP_SERVERS": secure.administrator.bootstrap_servers,
        "ESPER_KAFKA__SECURITY__PROTOCOL": "SSL",
        "ESPER_KAFKA__SECURITY__CA_FILE": str(secured.ca_file),
        "ESPER_KAFKA__SECURITY__CERT_FILE": str(secured.cert_file),
        "ESPER_KAFKA__SECURITY__KEY_FILE": str(secured.key_file),
        "COLUMNS": "200",
    }


def test_acls_command_applies_and_lists(stack: EmbeddedStack, as_administrator: dict[str, str], tmp_path: Path) -> None:
    code, printed = cli(stack, tmp_path, "acls", "apply", **as_administrator)
    assert (code, f"{len(PLAN.required)} present" in printed) == (0, True), printed
    code, printed = cli(stack, tmp_path, "acls", "list", "--principal", "trainer=alice", **as_administrator)
    assert (code, "User:alice" in printed, "missing" in printed) == (0, True, True), printed


async def test_password_command_reads_stdin(secure: SecureKafka, as_administrator: dict[str, str]) -> None:
    secure.passwords["typed"] = secrets.token_urlsafe(24)
    done = subprocess.run(
        [str(SCRIPTS / "esper"), "acls", "password", "typed"],
        input=secure.passwords["typed"] + "\n",
        env={**inherited_environment(), **as_administrator},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert secure.passwords["typed"] not in done.stdout + done.stderr
    await wait_until_async(lambda: is_let_in(secure.settings("typed")), 10, "the new user's entry")
