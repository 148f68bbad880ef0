"""Connects clients to the broker: their options, a preflight check, and the start.

Owns the client libraries' names for security options. Invariant: a client that the broker refuses fails within
``CONNECT_TIMEOUT_S`` with one error of ``esper.oona.broker_errors``, and never retries without limit.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import KafkaConnectionError, TopicAuthorizationFailedError, for_code
from aiokafka.protocol.admin import SaslHandShakeRequest
from aiokafka.protocol.metadata import MetadataRequest

from esper.config import KafkaSettings
from esper.errors import ConfigError, EsperError, NotAllowedError
from esper.oona.broker_errors import (
    CLIENT_ERRORS,
    hidden_topics_error,
    kafka_error,
    no_broker_error,
    no_credentials_error,
    no_tls_error,
)

CONNECT_TIMEOUT_S = 10.0
RESPONSE_TIMEOUT_MS = 5_000  # a broker that accepts the connection and sends nothing for this long counts as away

Host = tuple[str, int]
"""(name, port)."""

_Response = TypeVar("_Response")


def client_options(kafka: KafkaSettings) -> dict[str, Any]:
    """The keyword arguments of every aiokafka client: the broker's addresses and the security options.

    Raises:
        ConfigError: a certificate file cannot be used.
    """
    return {"bootstrap_servers": kafka.bootstrap_servers, **_security_options(kafka)}


def librdkafka_options(kafka: KafkaSettings) -> dict[str, Any]:
    """The same options for a client of confluent-kafka, in librdkafka's names."""
    security = kafka.security
    options: dict[str, Any] = {"bootstrap.servers": kafka.bootstrap_servers, "security.protocol": security.protocol}
    if security.uses_tls:
        files = {
            "ssl.ca.location": security.ca_file,
            "ssl.certificate.location": security.cert_file,
            "ssl.key.location": security.key_file,
        }
        options |= {name: str(path) for name, path in files.items() if path is not None}
        if security.key_password is not None:
            options["ssl.key.password"] = security.key_password.get_secret_value()
    if security.uses_sasl:
        assert security.password is not None
        options["sasl.mechanism"] = security.mechanism
        options["sasl.username"] = security.username
        options["sasl.password"] = security.password.get_secret_value()
    return options


def tls_context(kafka: KafkaSettings) -> ssl.SSLContext:
    """A TLS context that verifies the broker's certificate and host name.

    Raises:
        ConfigError: a certificate or key file is missing or invalid.
    """
    security = kafka.security
    try:
        context = ssl.create_default_context(cafile=security.ca_file)
        if security.cert_file is not None:
            # None would make OpenSSL prompt for the password at the terminal
            secret = security.key_password.get_secret_value() if security.key_password else ""
            context.load_cert_chain(security.cert_file, security.key_file, secret)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(f) for f in (security.ca_file, security.cert_file, security.key_file) if f)
        raise ConfigError(f"kafka.security: a certificate file cannot be used ({files}): {error}") from error
    return context


@asynccontextmanager
async def started(
    client: Any, kafka: KafkaSettings, timeout_s: float = CONNECT_TIMEOUT_S, *, topics: Collection[str] = ()
) -> AsyncIterator[Any]:
    """Start an aiokafka client; stop it on exit.

    Args:
        topics: the topics that the client will use; aiokafka waits without limit for one that it may not see.

    Raises:
        NotAllowedError: the broker refuses this client, or hides a topic from it.
        UnavailableError: no broker answers.
    """
    stop = client.close if hasattr(client, "close") else client.stop
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await preflight_check(kafka, topics)
                await client.start()
        except CLIENT_ERRORS as error:
            raise kafka_error(error, kafka) from error
        yield client
    finally:
        await stop()


async def preflight_check(kafka: KafkaSettings, topics: Collection[str] = ()) -> None:
    """Check that the broker accepts this client and shows it these topics.

    aiokafka only logs why a broker refuses it and then raises a connection error; one short connection before
    each start finds the reason.

    Raises:
        NotAllowedError: a broker refuses this client, or hides a topic from it.
        UnavailableError: none of the brokers answers.
    """
    hidden = await hidden_topics(kafka, topics)
    if hidden:
        raise hidden_topics_error(hidden, kafka)


async def hidden_topics(kafka: KafkaSettings, topics: Collection[str]) -> list[str]:
    """The topics that the broker does not show to this user. Creates none of them.

    Raises:
        NotAllowedError, UnavailableError: as ``preflight_check``.
    """

    async def query(host: Host) -> list[str]:
        response = await _fetch_metadata(host, kafka, sorted(topics))
        codes = {t["topic"]: for_code(t["error_code"]) for t in response.to_object()["topics"]}
        return [name for name in topics if codes.get(name) is TopicAuthorizationFailedError]

    return await _query_any(kafka, query)


async def _query_any(kafka: KafkaSettings, query: Callable[[Host], Awaitable[_Response]]) -> _Response:
    """The result of the first broker that answers; raises a refusal, if there was one, rather than a timeout."""
    failure: EsperError = no_broker_error(kafka)
    for host in _hosts(kafka):
        try:
            return await query(host)
        except (NotAllowedError, *CLIENT_ERRORS) as error:
            if not isinstance(failure, NotAllowedError):
                failure = kafka_error(error, kafka)
                failure.__cause__ = error if error is not failure else error.__cause__
    raise failure


async def _fetch_metadata(host: Host, kafka: KafkaSettings, topics: list[str]) -> Any:
    """A broker's metadata of topics. Distinguishes failures of TLS and of credentials, which aiokafka does not."""
    security = kafka.security
    try:
        connection = await _connect(host, _security_options(kafka))
    except ConnectionResetError as error:
        if security.uses_tls and await _accepts_plaintext(host):
            raise no_tls_error(kafka) from error
        raise
    try:
        return await connection.send(MetadataRequest(topics, allow_auto_topic_creation=False))
    except KafkaConnectionError as error:
        mechanisms = [] if security.uses_sasl else await _required_mechanisms(host, kafka)
        if mechanisms:
            raise no_credentials_error(kafka, mechanisms) from error
        raise
    finally:
        connection.close()


async def _accepts_plaintext(host: Host) -> bool:
    try:
        (await _connect(host, {})).close()
    except CLIENT_ERRORS:
        return False
    return True


async def _required_mechanisms(host: Host, kafka: KafkaSettings) -> list[str]:
    """The SASL mechanisms of a listener that closed the connection on the first request; empty if it needs none."""
    connection = await _connect(host, _security_options(kafka))
    try:
        response = await connection.send(SaslHandShakeRequest(kafka.security.mechanism))
    finally:
        connection.close()
    return list(response.enabled_mechanisms)


async def _connect(host: Host, options: dict[str, Any]) -> Any:
    return await create_conn(*host, request_timeout_ms=RESPONSE_TIMEOUT_MS, **options)


def _security_options(kafka: KafkaSettings) -> dict[str, Any]:
    security = kafka.security
    options: dict[str, Any] = {"security_protocol": security.protocol}
    if security.uses_tls:
        options["ssl_context"] = tls_context(kafka)
    if security.uses_sasl:
        assert security.username is not None
        assert security.password is not None
        options["sasl_mechanism"] = security.mechanism
        options["sasl_plain_username"] = security.username
        options["sasl_plain_password"] = security.password.get_secret_value()
    return options


def _hosts(kafka: KafkaSettings) -> list[Host]:
    try:
        return [(host, port) for host, port, _family in collect_hosts(kafka.bootstrap_servers)]
    except ValueError as error:
        raise ConfigError(
            f"ESPER_KAFKA__BOOTSTRAP_SERVERS is {kafka.bootstrap_servers!r}: write HOST:PORT[,HOST:PORT]"
        ) from error
