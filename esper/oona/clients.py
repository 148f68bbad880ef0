"""How every client of Oona reaches the broker: its options, its start, and the one error when that fails.

Nothing else in Esper knows aiokafka's names for security.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError, RecordListTooLargeError

from esper.config import KafkaSettings
from esper.errors import ConfigError, ContractError, EsperError, UnavailableError

CONNECT_TIMEOUT_S = 10.0


def client_options(kafka: KafkaSettings) -> dict[str, Any]:
    """The keyword arguments that every aiokafka client takes: where the broker is, and how to be let in.

    Raises:
        ConfigError: a certificate file cannot be used.
    """
    security = kafka.security
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers,
        "security_protocol": security.protocol,
    }
    if security.uses_tls:
        options["ssl_context"] = tls_context(kafka)
    if security.uses_sasl:
        assert security.username is not None
        assert security.password is not None
        options["sasl_mechanism"] = security.mechanism
        options["sasl_plain_username"] = security.username
        options["sasl_plain_password"] = security.password.get_secret_value()
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
            secret = security.key_password.get_secret_value() if security.key_password else None
            context.load_cert_chain(security.cert_file, security.key_file, secret)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(f) for f in (security.ca_file, security.cert_file, security.key_file) if f)
        raise ConfigError(f"kafka.security: a certificate file cannot be used ({files}): {error}") from error
    return context


@asynccontextmanager
async def started(client: Any, kafka: KafkaSettings, timeout_s: float = CONNECT_TIMEOUT_S) -> AsyncIterator[Any]:
    """Start an aiokafka client, and stop it at the end.

    Raises:
        UnavailableError: no broker answers.
    """
    stop = client.close if hasattr(client, "close") else client.stop
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await client.start()
        except (KafkaConnectionError, TimeoutError, OSError) as error:
            raise no_broker(kafka) from error
        yield client
    finally:
        await stop()


def kafka_error(error: BaseException, kafka: KafkaSettings) -> EsperError:
    """What an error of aiokafka's means to its caller: the one place that translates them."""
    if isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError)):
        return ContractError(f"the broker refused a record as too large: {error}; see max.message.bytes of its topic")
    return UnavailableError(f"Kafka at {kafka.bootstrap_servers} did not take the events: {error!r}")


def no_broker(kafka: KafkaSettings) -> UnavailableError:
    """The one error for a broker that does not answer."""
    return UnavailableError(
        f"no Kafka broker answers at {kafka.bootstrap_servers}: is it running (`esper status`), and is "
        "ESPER_KAFKA__BOOTSTRAP_SERVERS right?"
    )
