"""The `urza` section of the settings."""

import hashlib
import re
from typing import Self

from pydantic import Field, model_validator

from esper.config import SectionModel
from esper.errors import ConfigError

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


class UrzaSettings(SectionModel):
    """How the library of blueprints and kernels is served."""

    host: str = Field("127.0.0.1", description="The address that the API listens on.")
    port: int = Field(0, ge=0, le=65535, description="Its port; 0 takes a free one, which the log names.")
    reader_tokens_sha256: str = Field(
        "", description="SHA-256 of each token that may read, separated by commas; `esper roles token` makes one."
    )
    writer_tokens_sha256: str = Field(
        "", description="SHA-256 of each token that may read and ask for changes, separated by commas."
    )
    is_open: bool = Field(
        False, description="Serves other hosts without a token; for use behind something that asks who comes."
    )
    cache_mb: float = Field(64.0, ge=0, description="Memory for answers and kernels that are given again, in MiB.")
    kernel_seed: int = Field(0, description="Makes the weights of new kernels reproducible.")
    poll_s: float = Field(0.2, gt=0, description="Pause between two looks at the projection, in seconds.")
    change_timeout_s: float = Field(
        5.0, gt=0, description="How long a change waits for its projection before the API answers 202, in seconds."
    )

    @property
    def reader_hashes(self) -> tuple[str, ...]:
        """SHA-256 of the tokens that may read."""
        return _listed(self.reader_tokens_sha256)

    @property
    def writer_hashes(self) -> tuple[str, ...]:
        """SHA-256 of the tokens that may read and write."""
        return _listed(self.writer_tokens_sha256)

    @property
    def has_tokens(self) -> bool:
        """Whether who comes has to show one."""
        return bool(self.reader_hashes or self.writer_hashes)

    @model_validator(mode="after")
    def _hashes_are_some(self) -> Self:
        for name in ("reader_tokens_sha256", "writer_tokens_sha256"):
            if not all(_SHA256.match(h) for h in _listed(getattr(self, name))):
                raise ValueError(f"{name} wants 64 hexadecimal digits a token, not the token: see `esper roles token`")
        return self


def check_exposure(own: UrzaSettings) -> None:
    """Make sure that no other host is let in without a token.

    Raises:
        ConfigError: it would be; with what to set.
    """
    if own.has_tokens or own.is_open or own.host in LOOPBACK:
        return
    raise ConfigError(
        f"urza.host is {own.host}, which other hosts reach, and no token is asked for: make tokens with "
        "`esper roles token` and set ESPER_URZA__WRITER_TOKENS_SHA256 and ESPER_URZA__READER_TOKENS_SHA256, "
        "or set ESPER_URZA__IS_OPEN=true behind something that asks who comes"
    )


def token_hash(token: str) -> str:
    """How a token stands in the settings."""
    return hashlib.sha256(token.encode()).hexdigest()


def _listed(text: str) -> tuple[str, ...]:
    return tuple(h.strip() for h in text.split(",") if h.strip())
