"""How every client of Oona reaches the broker: its options, the knock before its start, and the start.

Nothing else in Esper knows the client libraries' names for security. A client that is not let in
ends within CONNECT_TIMEOUT_S with one error (esper.oona.broker_errors), never in endless retries.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import KafkaConnectionError, KafkaError, TopicAuthorizationFailedError, for_code
from aiokafka.protocol.admin import SaslHandShakeRequest
from aiokafka.protocol.metadata import MetadataRequest

from esper.config import KafkaSettings
from esper.errors import ConfigError, EsperError, NotAllowedError
from esper.oona.broker_errors import hidden, no_broker, wants_a_user, wants_no_tls
from esper.oona.broker_errors import kafka_error as kafka_error  # whoever starts a client has to explain its errors

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_MS = 5_000  # a broker that took the connection and says nothing this long is away

Host = tuple[str, int]
"""(name, port)."""

_Answer = TypeVar("_Answer")


def client_options(kafka: KafkaSettings) -> dict[str, Any]:
    """The keyword arguments that every aiokafka client takes: where the broker is, and how to be let in.

    Raises:
        ConfigError: a certificate file cannot be used.
    """
    return {"bootstrap_servers": kafka.bootstrap_servers, **_security_options(kafka)}


def librdkafka_options(kafka: KafkaSettings) -> dict[str, Any]:
    """The same for a client of confluent-kafka, in librdkafka's names."""
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
    """A context that checks the broker's certificate and its host name.

    Raises:
        ConfigError: a file is missing, or is not what it should be.
    """
    security = kafka.security
    try:
        context = ssl.create_default_context(cafile=security.ca_file)
        if security.cert_file is not None:
            # a text, even an empty one, keeps OpenSSL from asking for it at the terminal
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
    """Start an aiokafka client, and stop it at the end.

    Args:
        topics: those that it will use: aiokafka waits for ever for one that it may not see.

    Raises:
        NotAllowedError: the broker does not let this process in, or hides a topic; with what to mend.
        UnavailableError: no broker answers.
    """
    stop = client.close if hasattr(client, "close") else client.stop
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await preflight_check(kafka, topics)
                await client.start()
        except (KafkaError, OSError) as error:  # a TimeoutError is an OSError
            raise kafka_error(error, kafka) from error
        yield client
    finally:
        await stop()


async def preflight_check(kafka: KafkaSettings, topics: Collection[str] = ()) -> None:
    """Find out whether the broker lets this process in, and shows it these topics.

    aiokafka keeps the reason of a refusal for its log and says only that nobody answers; hence
    one short connection before each start.

    Raises:
        NotAllowedError: a broker refuses, or hides a topic; with what to mend.
        UnavailableError: none of the brokers answers.
    """
    unseen = await hidden_topics(kafka, topics)
    if unseen:
        raise hidden(unseen, kafka)


async def hidden_topics(kafka: KafkaSettings, topics: Collection[str]) -> list[str]:
    """Those of the topics that the broker does not show to this user. Makes none of them.

    Raises:
        NotAllowedError, UnavailableError: as ``knock``.
    """

    async def ask(host: Host) -> list[str]:
        answer = await _metadata(host, kafka, sorted(topics))
        codes = {t["topic"]: for_code(t["error_code"]) for t in answer.to_object()["topics"]}
        return [name for name in topics if codes.get(name) is TopicAuthorizationFailedError]

    return await _ask_any(kafka, ask)


async def _ask_any(kafka: KafkaSettings, ask: Callable[[Host], Awaitable[_Answer]]) -> _Answer:
    """What the first broker says that answers; else why none does, a refusal before a silence."""
    refused: EsperError = no_broker(kafka)
    for host in _hosts(kafka):
        try:
            return await ask(host)
        except (NotAllowedError, KafkaError, OSError) as error:
            told = kafka_error(error, kafka)
            if not isinstance(refused, NotAllowedError):
                refused = told
                refused.__cause__ = error if error is not told else error.__cause__
    raise refused


async def _metadata(host: Host, kafka: KafkaSettings, topics: list[str]) -> Any:
    """A broker's answer about topics; the errors of TLS and users that aiokafka does not tell apart are told here."""
    security = kafka.security
    try:
        connection = await _connect(host, _security_options(kafka))
    except ConnectionResetError as error:
        if security.uses_tls and await _speaks_plaintext(host):
            raise wants_no_tls(kafka) from error
        raise
    try:
        return await connection.send(MetadataRequest(topics, allow_auto_topic_creation=False))
    except KafkaConnectionError as error:
        mechanisms = [] if security.uses_sasl else await _mechanisms_asked_for(host, kafka)
        if mechanisms:
            raise wants_a_user(kafka, mechanisms) from error
        raise
    finally:
        connection.close()


async def _speaks_plaintext(host: Host) -> bool:
    try:
        (await _connect(host, {})).close()
    except (KafkaError, OSError):
        return False
    return True


async def _mechanisms_asked_for(host: Host, kafka: KafkaSettings) -> list[str]:
    """How a listener that closed on the first question wants to be told who asks; empty: it does not."""
    connection = await _connect(host, _security_options(kafka))
    try:
        answer = await connection.send(SaslHandShakeRequest(kafka.security.mechanism))
    finally:
        connection.close()
    return list(answer.enabled_mechanisms)


async def _connect(host: Host, options: dict[str, Any]) -> Any:
    return await create_conn(*host, request_timeout_ms=ANSWER_TIMEOUT_MS, **options)


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
