"""Creates users of the broker with SCRAM passwords, through the admin API and never on a command line."""

from collections.abc import Mapping

from pydantic import SecretStr

from esper.config import KafkaSettings
from esper.errors import ConfigError
from esper.oona.admin.admin_client import REQUEST_TIMEOUT_S, confluent_admin, open_admin, wait_for_results

ITERATIONS = 8192  # of the stored hash; Kafka accepts no fewer than 4096
MIN_PASSWORD_LENGTH = 16  # an eavesdropper on a login can try passwords offline
MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-512")


async def set_passwords(
    kafka: KafkaSettings, passwords: Mapping[str, SecretStr], mechanism: str = "SCRAM-SHA-512"
) -> None:
    """Create users with these passwords, or change the passwords of existing users. Open connections stay open.

    Raises:
        ConfigError: a password is too short, or the mechanism is unknown.
        NotAllowedError: this user may not change users.
        UnavailableError: no broker answers.
    """
    if mechanism not in MECHANISMS:
        raise ConfigError(f"unknown SASL mechanism {mechanism!r}: use one of {', '.join(MECHANISMS)}")
    for name, password in passwords.items():
        if len(password.get_secret_value()) < MIN_PASSWORD_LENGTH:
            raise ConfigError(f"the password of {name} is too short: use at least {MIN_PASSWORD_LENGTH} characters")
    admin, confluent = await open_admin(kafka), confluent_admin()
    info = confluent.ScramCredentialInfo(confluent.ScramMechanism[mechanism.replace("-", "_")], ITERATIONS)
    changes = [
        confluent.UserScramCredentialUpsertion(name, info, password.get_secret_value().encode())
        for name, password in passwords.items()
    ]
    results = admin.alter_user_scram_credentials(changes, request_timeout=REQUEST_TIMEOUT_S)
    await wait_for_results(results.values(), kafka)
