"""The embedded stack: real Kafka, Postgres and S3, started and stopped as one."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from esper.config import ENV_DELIMITER, ENV_PREFIX, STATE_DIR_VARIABLE, Settings
from esper.embedded.kafka import EmbeddedKafka
from esper.embedded.postgres import EmbeddedPostgres
from esper.embedded.s3 import BUCKET, EmbeddedS3

FOLDER_MODE = 0o711  # Postgres may run as another user, who must be able to access its subfolder


class EmbeddedStack:
    """The three services on 127.0.0.1, as a context manager.

    Args:
        root: folder for all data and logs. A later stack in the same folder finds the data.
        report: called with a progress line for slow steps.
    """

    def __init__(self, root: Path, *, report: Callable[[str], None] = lambda _line: None) -> None:
        self.root = root
        self.kafka = EmbeddedKafka(root / "kafka", report=report)
        self.postgres = EmbeddedPostgres(root / "postgres")
        self.s3 = EmbeddedS3(root / "s3")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def parts(self) -> tuple[EmbeddedKafka | EmbeddedPostgres | EmbeddedS3, ...]:
        """Kafka, Postgres and S3."""
        return (self.kafka, self.postgres, self.s3)

    def start(self) -> None:
        """Start the three services, and wait until all accept connections.

        Raises:
            UnavailableError: one does not start; the message has the end of its log.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(FOLDER_MODE)
        # one after the other, on this thread: the children live as long as the thread that starts them
        for part in self.parts:
            part.start()

    def stop(self) -> None:
        """Stop the three services concurrently; ignores those that do not run."""
        with ThreadPoolExecutor(len(self.parts)) as pool:
            list(pool.map(lambda part: part.stop(), self.parts))

    def sections(self) -> dict[str, dict[str, Any]]:
        """The settings sections with this stack's addresses; secrets are in plain text."""
        return {
            "kafka": {"bootstrap_servers": self.kafka.bootstrap_servers},
            "postgres": {"dsn": self.postgres.dsn},
            "s3": {
                "endpoint_url": self.s3.endpoint_url,
                "bucket": BUCKET,
                "access_key": self.s3.access_key,
                "secret_key": self.s3.secret_key,
            },
        }

    def settings(self) -> Settings:
        """Settings with this stack's addresses, and defaults for the rest."""
        return Settings.model_validate({**self.sections(), "source": f"the stack in {self.root}"})

    def environment(self) -> dict[str, str]:
        """The environment variables that make a child process use this stack, without any others."""
        named = {
            f"{ENV_PREFIX}{section}{ENV_DELIMITER}{key}".upper(): value
            for section, values in self.sections().items()
            for key, value in values.items()
        }
        return {**named, STATE_DIR_VARIABLE: str(self.root)}


def inherited_environment() -> dict[str, str]:
    """This process's environment without Esper's own variables, which could name other services."""
    return {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
