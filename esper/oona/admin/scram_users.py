"""Users of the broker: their SCRAM passwords, through the admin API and never on a command line."""

from collections.abc import Mapping

from pydantic import SecretStr

from esper.config import KafkaSettings
from esper.errors import ConfigError
from esper.oona.admin.admin_client import REQUEST_TIMEOUT_S, admin_names, answers_of, open_admin

ITERATIONS = 8192  # of the hash that the broker keeps; Kafka takes no fewer than 4096
MIN_PASSWORD_LENGTH = 16  # who listens in on a login can try passwords at home
MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-512")


async def set_passwords(
    kafka: KafkaSettings, passwords: Mapping[str, SecretStr], mechanism: str = "SCRAM-SHA-512"
) -> None:
    """Make users with these passwords, or give them new ones. Connections that are open go on.

    Raises:
        ConfigError: a password is too short, or there is no such mechanism.
        NotAllowedError: this user may not; UnavailableError: no broker answers.
    """
    if mechanism not in MECHANISMS:
        raise ConfigError(f"there is no mechanism {mechanism!r}: one of {', '.join(MECHANISMS)}")
    for name, password in passwords.items():
        if len(password.get_secret_value()) < MIN_PASSWORD_LENGTH:
            raise ConfigError(f"the password of {name} is too short: {MIN_PASSWORD_LENGTH} characters at least")
    admin, of = await open_admin(kafka), admin_names()
    info = of.ScramCredentialInfo(of.ScramMechanism[mechanism.replace("-", "_")], ITERATIONS)
    changes = [
        of.UserScramCredentialUpsertion(name, info, password.get_secret_value().encode())
        for name, password in passwords.items()
    ]
    done = admin.alter_user_scram_credentials(changes, request_timeout=REQUEST_TIMEOUT_S)
    await answers_of(done.values(), kafka)
