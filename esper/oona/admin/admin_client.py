"""The broker's administration through confluent-kafka: ACLs and users, which aiokafka's admin client does not know.

Needs the extra ``esper[admin]``, which is imported when it is needed. Owns the client and its errors, not
what is done with it.
"""

import asyncio
import importlib
from collections.abc import Iterable
from typing import Any

from esper.config import KafkaSettings
from esper.errors import ConfigError, EsperError, NotAllowedError, UnavailableError
from esper.oona.broker_errors import principal
from esper.oona.client_options import librdkafka_options, preflight_check

REQUEST_TIMEOUT_S = 10.0


async def open_admin(kafka: KafkaSettings) -> Any:
    """A client for administration, for a broker that lets this process in. It needs no closing.

    Raises:
        ConfigError: the extra is not installed.
        NotAllowedError, UnavailableError: as ``esper.oona.client_options.knock``.
    """
    admin = admin_names().AdminClient({**librdkafka_options(kafka), "log_level": 0})
    await preflight_check(kafka)  # librdkafka would try again until its time is up, and not say why
    return admin


def admin_names() -> Any:
    """confluent_kafka.admin, which does not declare its names."""
    try:
        return importlib.import_module("confluent_kafka.admin")
    except ImportError as error:
        raise ConfigError("ACLs and users need confluent-kafka: pip install 'esper[admin]'") from error


async def answers_of(futures: Iterable[Any], kafka: KafkaSettings) -> list[Any]:
    """What librdkafka's futures give.

    Raises:
        NotAllowedError, ConfigError, UnavailableError: the first that failed.
    """
    from confluent_kafka import KafkaException

    try:
        return await asyncio.gather(*(asyncio.wrap_future(f) for f in futures))
    except KafkaException as error:
        raise _explained(error.args[0], kafka) from None  # its text is the broker's whole request


def not_for(kafka: KafkaSettings) -> NotAllowedError:
    """Administration is not for this user."""
    return NotAllowedError(
        f"{principal(kafka)} may not see or change ACLs and users of Kafka at {kafka.bootstrap_servers}: "
        "do it as the broker's administrator (super.users)"
    )


def _explained(error: Any, kafka: KafkaSettings) -> EsperError:
    match error.name():
        case "CLUSTER_AUTHORIZATION_FAILED":
            return not_for(kafka)
        case "SECURITY_DISABLED":
            return ConfigError(
                f"Kafka at {kafka.bootstrap_servers} keeps no ACLs: everybody may do everything; "
                "set authorizer.class.name on the broker"
            )
    return UnavailableError(f"Kafka at {kafka.bootstrap_servers} did not do it: {error.name()}")
