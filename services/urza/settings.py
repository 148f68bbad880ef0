"""The `urza` section of the settings."""

import hashlib
import re
from typing import ClassVar, Self

from pydantic import Field, model_validator

from esper.errors import ConfigError
from esper.metrics.settings import MetricsEndpointSettings

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


class UrzaSettings(MetricsEndpointSettings):
    """Settings of the library of blueprints and kernels, and of its API."""

    metrics_port_variable: ClassVar[str] = "ESPER_URZA__METRICS_PORT"

    host: str = Field("127.0.0.1", description="Address on which the API listens; other than loopback it needs tokens.")
    port: int = Field(0, ge=0, le=65535, description="Port of the API; 0 takes a free port, which the log names.")
    reader_tokens_sha256: str = Field(
        "", description="SHA-256 of each token that may read, comma-separated; see `esper roles token`."
    )
    writer_tokens_sha256: str = Field(
        "", description="SHA-256 of each token that may read and request changes, comma-separated."
    )
    allow_anonymous: bool = Field(
        False, description="Serve other hosts without a token; only behind a proxy that authenticates callers."
    )
    cache_mib: float = Field(
        64.0, ge=0, description="Memory for cached responses and kernels, in MiB; 0 caches nothing."
    )
    kernel_rng_seed: int = Field(0, description="Seed of the weights of new kernels.")
    certify_widths: tuple[int, ...] = Field(
        (16, 64),
        min_length=1,
        max_length=8,
        description="Layer widths at which a blueprint is examined before its certification.",
    )
    sandbox_wall_s: float = Field(
        30.0, gt=0, description="Maximum wall time of a sandbox job, in seconds; a short time rejects good blueprints."
    )
    sandbox_cpu_s: int = Field(20, ge=1, description="Maximum CPU time of one sandbox job, in seconds.")
    sandbox_memory_mib: int = Field(
        2048, ge=256, description="Memory that a sandbox job may allocate, in MiB; the largest kernel needs 1024."
    )
    poll_s: float = Field(
        0.2, gt=0, description="Seconds between two reads of the projections; small values load Postgres."
    )
    change_timeout_s: float = Field(
        5.0, gt=0, description="Seconds that a change waits for Kafka (then 503) and its projection (then 202)."
    )

    @property
    def reader_hashes(self) -> tuple[str, ...]:
        """SHA-256 digests of the tokens that may read."""
        return _split(self.reader_tokens_sha256)

    @property
    def writer_hashes(self) -> tuple[str, ...]:
        """SHA-256 digests of the tokens that may read and write."""
        return _split(self.writer_tokens_sha256)

    @property
    def has_tokens(self) -> bool:
        """Whether callers must present a token."""
        return bool(self.reader_hashes or self.writer_hashes)

    @model_validator(mode="after")
    def _check_token_digests(self) -> Self:
        for name in ("reader_tokens_sha256", "writer_tokens_sha256"):
            if not all(_SHA256.match(h) for h in _split(getattr(self, name))):
                raise ValueError(
                    f"{name} must hold the SHA-256 of each token (64 hexadecimal digits), not the token; "
                    "`esper roles token` prints it"
                )
        return self


def check_exposure(settings: UrzaSettings) -> None:
    """Check that the API does not serve other hosts without a token.

    Raises:
        ConfigError: it would; the message names the settings to change.
    """
    if settings.has_tokens or settings.allow_anonymous or settings.host in LOOPBACK:
        return
    raise ConfigError(
        f"urza.host is {settings.host}, which other hosts can reach, and no token is configured; create tokens with "
        "`esper roles token` and set ESPER_URZA__WRITER_TOKENS_SHA256 and ESPER_URZA__READER_TOKENS_SHA256, "
        "or set ESPER_URZA__ALLOW_ANONYMOUS=true behind a proxy that authenticates callers"
    )


def token_hash(token: str) -> str:
    """The digest of a token, as the settings hold it."""
    return hashlib.sha256(token.encode()).hexdigest()


def _split(text: str) -> tuple[str, ...]:
    return tuple(h.strip() for h in text.split(",") if h.strip())
