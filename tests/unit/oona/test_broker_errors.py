"""Errors for refusals: always one line, never a secret; and every error class is in the tree."""

import re
import ssl
import traceback
from typing import Any
from urllib.parse import quote

import asyncpg
import psycopg
import pytest
from aiokafka import errors as kafka_errors
from hypothesis import assume, given
from hypothesis import strategies as st

from esper import errors
from esper.config import KafkaSettings, PostgresSettings
from esper.errors import ConfigError, ContractError, NotAllowedError, UnavailableError
from esper.oona.broker_errors import kafka_error
from esper.streams.database.postgres_errors import database_address, postgres_error

SECRETS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=8, max_size=40)
SECRETS = SECRETS.map(lambda s: f"~{s}~")  # not a word of a message, or of a setting that other tests list
MARK = "s3cr3t"


def test_error_tree_lists_every_error() -> None:
    drawn = re.findall(r"^(?:[│ ]*[├└]── )?(\w+Error)\b", errors.__doc__ or "", re.M)
    defined = [name for name, kind in vars(errors).items() if isinstance(kind, type)]
    assert sorted(drawn) == sorted(defined)


# -- Kafka ----------------------------------------------------------------------------------


def kafka(password: str = MARK, **security: Any) -> KafkaSettings:
    own = {"protocol": "SASL_SSL", "username": "alice", "password": password, **security}
    return KafkaSettings.model_validate({"bootstrap_servers": "broker:9093", "security": own})


def certificate_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "as OpenSSL says it"
    return error


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (kafka_errors.SaslAuthenticationFailed("no"), "refuses user 'alice' (SCRAM-SHA-512)"),
        (kafka_errors.UnsupportedSaslMechanismError(), "has not enabled SCRAM-SHA-512"),
        (kafka_errors.IllegalSaslStateError(), "requires no user"),
        (kafka_errors.TopicAuthorizationFailedError("runs"), "User:alice lacks a right on topic runs"),
        (kafka_errors.TopicAuthorizationFailedError({"b", "a"}), "lacks a right on topic a, b"),
        (kafka_errors.GroupAuthorizationFailedError("workers"), "lacks a right on consumer group workers"),
        (kafka_errors.ClusterAuthorizationFailedError(), "lacks a right on the cluster"),
        (certificate_error(10), "has expired: renew it on the broker"),
        (certificate_error(62), "is for another host"),
        (certificate_error(20), "is not signed by an authority that this system trusts"),
    ],
)
def test_kafka_error_finds_a_refusal_in_the_chain(raised: BaseException, expected: str) -> None:
    outer = kafka_errors.KafkaConnectionError("closed")
    outer.__cause__ = raised
    for error in (raised, outer):
        translated = kafka_error(error, kafka())
        assert isinstance(translated, NotAllowedError)
        assert expected in str(translated)
        assert "\n" not in str(translated)


def test_kafka_error_separates_transient_from_permanent() -> None:
    for away in (kafka_errors.KafkaConnectionError("gone"), TimeoutError(), ConnectionRefusedError()):
        assert "no Kafka broker answers at broker:9093" in str(kafka_error(away, kafka()))
    assert isinstance(kafka_error(kafka_errors.NotEnoughReplicasError(), kafka()), UnavailableError)
    assert isinstance(kafka_error(kafka_errors.MessageSizeTooLargeError(), kafka()), ContractError)
    ours = ContractError("known already")
    assert kafka_error(ours, kafka()) is ours


@given(secret=SECRETS)
def test_kafka_error_never_shows_the_password(secret: str) -> None:
    assume(len(set(secret)) > 5)  # "aaaaaaaa" may stand anywhere by chance
    known = kafka(secret)
    for raised in (kafka_errors.SaslAuthenticationFailed("no"), certificate_error(20), TimeoutError()):
        with pytest.raises(errors.EsperError) as caught:
            raise kafka_error(raised, known) from raised
        shown = "".join(traceback.format_exception(caught.value))
        assert secret not in shown + repr(known) + str(known.model_dump())


# -- Postgres -------------------------------------------------------------------------------


def postgres(dsn: str) -> PostgresSettings:
    return PostgresSettings.model_validate({"dsn": dsn})


@given(secret=SECRETS, as_query=st.booleans())
def test_dsn_accepts_an_encoded_password_and_hides_it(secret: str, as_query: bool) -> None:
    coded = quote(secret, safe="")
    dsn = f"postgresql://u@h/d?password={coded}" if as_query else f"postgresql://u:{coded}@h:1,[::1]:2/d"
    address = database_address(postgres(dsn))
    assert (address.dsn, address.user) == (dsn, "u")
    assert address.location in ("h/d", "h:1,[::1]:2/d")
    assume(len(set(secret)) > 5)
    assert secret not in repr(address)
    assert coded not in repr(address)


@given(head=st.text("ab1", min_size=1), middle=st.sampled_from("@/:?#[]"), tail=st.text("cd2", min_size=1))
def test_dsn_error_never_shows_an_unencoded_password(head: str, middle: str, tail: str) -> None:
    """The DSN is either parsed as the drivers parse it, or refused without being shown."""
    secret = f"{MARK}{head}{middle}{MARK}{tail}"
    try:
        address = database_address(postgres(f"postgresql://u:{secret}@h/d"))
    except ConfigError as error:
        shown = "".join(traceback.format_exception(error))
    else:
        assert address.location == "h/d"
        shown = repr(address)
    assert MARK not in shown


@pytest.mark.parametrize(
    "dsn", ["", "h/d", "host=h password=s3cr3t", "mysql://u:s3cr3t@h/d", "postgresql://u:s3cr3t@h:x/d"]
)
def test_dsn_error_never_shows_a_malformed_dsn(dsn: str) -> None:
    with pytest.raises(ConfigError, match="write postgresql://USER:PASSWORD@HOST:PORT/DATABASE") as caught:
        database_address(postgres(dsn))
    assert MARK not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (asyncpg.InvalidPasswordError("password authentication failed"), NotAllowedError),
        (asyncpg.InvalidAuthorizationSpecificationError('role "u" does not exist'), NotAllowedError),
        (asyncpg.InsufficientPrivilegeError("permission denied for schema x"), NotAllowedError),
        (psycopg.errors.InsufficientPrivilege("permission denied for schema x"), NotAllowedError),
        (psycopg.OperationalError("FATAL:  no pg_hba.conf entry for host"), NotAllowedError),
        (asyncpg.InvalidCatalogNameError('database "d" does not exist'), ConfigError),
        (asyncpg.CannotConnectNowError("the database system is starting up"), UnavailableError),
        (psycopg.OperationalError("connection refused\n\tIs the server running?"), UnavailableError),
        (TimeoutError(), UnavailableError),
    ],
)
def test_postgres_error_translates_both_drivers(raised: BaseException, kind: type[Exception]) -> None:
    translated = postgres_error(raised, postgres(f"postgresql://u:{MARK}@h:5432/d"))
    assert type(translated) is kind
    assert "\n" not in str(translated)
    assert MARK not in str(translated)
