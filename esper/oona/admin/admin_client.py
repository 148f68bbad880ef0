"""The admin client of confluent-kafka, for ACLs and users, which aiokafka's admin client does not support.

Owns the client and the translation of its errors; ``acls`` and ``scram_users`` own the requests. Requires the extra
``esper[admin]``, which is imported on first use.
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
    """An admin client for a broker that accepts this user. It needs no closing.

    Raises:
        ConfigError: the extra ``esper[admin]`` is not installed.
        NotAllowedError, UnavailableError: as ``esper.oona.client_options.preflight_check``.
    """
    admin = confluent_admin().AdminClient({**librdkafka_options(kafka), "log_level": 0})
    await preflight_check(kafka)  # librdkafka would retry until its timeout and not report the reason
    return admin


def confluent_admin() -> Any:
    """The module confluent_kafka.admin, imported on first use; typed Any because it does not export its names.

    Raises:
        ConfigError: the extra ``esper[admin]`` is not installed.
    """
    try:
        return importlib.import_module("confluent_kafka.admin")
    except ImportError as error:
        raise ConfigError(
            "ACLs and users require confluent-kafka, which is not installed: pip install 'esper[admin]'"
        ) from error


async def wait_for_results(futures: Iterable[Any], kafka: KafkaSettings) -> list[Any]:
    """The results of librdkafka's futures.

    Raises:
        NotAllowedError, ConfigError, UnavailableError: the first that failed.
    """
    from confluent_kafka import KafkaException

    try:
        return await asyncio.gather(*(asyncio.wrap_future(f) for f in futures))
    except KafkaException as error:
        raise _translated(error.args[0], kafka) from None  # its text would repeat the whole request


def not_administrator_error(kafka: KafkaSettings) -> NotAllowedError:
    """The error for a user without administrative rights."""
    return NotAllowedError(
        f"{principal(kafka)} may not see or change ACLs and users of Kafka at {kafka.bootstrap_servers}: "
        "do it as the broker's administrator (super.users)"
    )


def _translated(error: Any, kafka: KafkaSettings) -> EsperError:
    match error.name():
        case "CLUSTER_AUTHORIZATION_FAILED":
            return not_administrator_error(kafka)
        case "SECURITY_DISABLED":
            return ConfigError(
                f"Kafka at {kafka.bootstrap_servers} has no authorizer, so every client may do everything; "
                "set authorizer.class.name on the broker"
            )
    return UnavailableError(f"Kafka at {kafka.bootstrap_servers}: the request failed with {error.name()}; retry it")
