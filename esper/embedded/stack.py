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

PUBLIC_FOLDER = 0o711  # Postgres may run as another user, which has to get through


class EmbeddedStack:
    """Context manager around the three services, all on 127.0.0.1.

    Args:
        root: a fresh folder for all data and logs; a stack that is started on it again
            finds its data.
        report: told, in a few words, what takes time.
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
        """The three."""
        return (self.kafka, self.postgres, self.s3)

    def start(self) -> None:
        """Start the three, and wait until all answer.

        Raises:
            UnavailableError: one does not start; with the end of its log.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(PUBLIC_FOLDER)
        # one after the other, from this thread: the kernel binds the children's life to it
        for part in self.parts:
            part.start()

    def stop(self) -> None:
        """Stop the three, side by side. Fine when some do not run."""
        with ThreadPoolExecutor(len(self.parts)) as pool:
            list(pool.map(lambda part: part.stop(), self.parts))

    def sections(self) -> dict[str, dict[str, Any]]:
        """The settings sections that point here, with their secrets in the clear."""
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
        """Settings that point here, and are else the defaults."""
        return Settings.model_validate({**self.sections(), "source": f"the stack in {self.root}"})

    def environment(self) -> dict[str, str]:
        """The variables that point a child process here; the rest of the environment is not in it."""
        named = {
            f"{ENV_PREFIX}{section}{ENV_DELIMITER}{key}".upper(): value
            for section, values in self.sections().items()
            for key, value in values.items()
        }
        return {**named, STATE_DIR_VARIABLE: str(self.root)}


def inherited_environment() -> dict[str, str]:
    """This process's variables without those that would point elsewhere."""
    return {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
