"""The `urza` section of the settings."""

import hashlib
import re
from typing import Self

from pydantic import Field, model_validator

from esper.config import SectionModel
from esper.errors import ConfigError
from esper.metrics.settings import MetricsAddress

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
    certify_widths: tuple[int, ...] = Field(
        (16, 64),
        min_length=1,
        max_length=8,
        description="Widths (output features) in which a blueprint is examined before it is certified.",
    )
    sandbox_wall_s: float = Field(
        30.0,
        gt=0,
        description="How long one job of the sandbox may take: a blueprint, or a batch of kernels, in seconds.",
    )
    sandbox_cpu_s: int = Field(
        20, ge=1, description="How much processor time one job of the sandbox may use, in seconds."
    )
    sandbox_memory_mb: int = Field(
        2048,
        ge=256,
        description="How much memory one job of the sandbox may take, in MiB; the largest kernel needs 1 GiB.",
    )
    parallel_uploads: int = Field(10, ge=1, le=50, description="How many kernels go to S3 at a time.")
    poll_s: float = Field(0.2, gt=0, description="Pause between two looks at the projection, in seconds.")
    change_timeout_s: float = Field(
        5.0,
        gt=0,
        description="How long a change waits for Kafka (then 503) and for its projection (then 202), in seconds.",
    )
    metrics_host: str = Field("127.0.0.1", description="The address that metrics and readiness are served on.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Where Prometheus reads; 0 takes a free port, which the log names."
    )

    @property
    def metrics_address(self) -> MetricsAddress:
        """Where Urza answers Prometheus."""
        return MetricsAddress(self.metrics_host, self.metrics_port, "ESPER_URZA__METRICS_PORT")

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
