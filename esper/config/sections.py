"""The sections that Esper itself needs: broker, database, object store, logging.

Each field says what it is for; ``esper config docs`` prints them. Invariant: whatever a section
holds as a secret is known to ``esper.redaction`` from the moment the section exists.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from esper.redaction import remember_secret


class SectionModel(BaseModel):
    """Base of every settings section: a key that is not known is an error, a secret is never shown."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    def model_post_init(self, _context: Any, /) -> None:
        """Tell the logs which values to hide."""
        for value in self.__dict__.values():
            if isinstance(value, SecretStr):
                remember_secret(value.get_secret_value())


class KafkaSecurity(SectionModel):
    """How the broker lets this process in. Production wants ``SASL_SSL``, a user for each service."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="Whether the connection is encrypted (SSL) and asks for a user (SASL)."
    )
    mechanism: Literal["SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="How the password is proved to the broker."
    )
    username: str | None = Field(None, description="The user, where the protocol has SASL in it.")
    password: SecretStr | None = Field(None, description="The user's password.")
    ca_file: Path | None = Field(
        None, description="The authority that signed the broker's certificate; the system's own where it is not set."
    )
    cert_file: Path | None = Field(None, description="This client's certificate, for a broker that asks for one.")
    key_file: Path | None = Field(None, description="The private key of `cert_file`.")
    key_password: SecretStr | None = Field(None, description="What `key_file` is encrypted with.")

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.protocol.endswith("SSL")

    @property
    def uses_sasl(self) -> bool:
        """Whether a user name and a password are asked for."""
        return self.protocol.startswith("SASL")

    @model_validator(mode="after")
    def _sasl_has_a_user(self) -> Self:
        lacking = [name for name in ("username", "password") if getattr(self, name) is None]
        if self.uses_sasl and lacking:
            variables = " and ".join(f"ESPER_KAFKA__SECURITY__{name.upper()}" for name in lacking)
            raise ValueError(f"{self.protocol} needs username and password; set {variables}")
        return self


class KafkaSettings(SectionModel):
    """The broker. Production wants ``replication_factor`` 3 and ``min_insync_replicas`` 2."""

    bootstrap_servers: str = Field(description="Brokers to ask first, `host:port`, separated by commas.")
    security: KafkaSecurity = Field(
        KafkaSecurity.model_validate({}), description="How the broker lets this process in."
    )
    replication_factor: int = Field(1, ge=1, description="Copies of each partition that `esper topics apply` asks for.")
    min_insync_replicas: int = Field(1, ge=1, description="Copies that must have a record before it counts as written.")
    telemetry_retention_h: float = Field(72.0, gt=0, description="How long health signals are kept, in hours.")


class PostgresSettings(SectionModel):
    """The database of the projections."""

    dsn: SecretStr = Field(description="Where it is: `postgresql://user:password@host:port/database`.")
    schema_name: str = Field(
        "esper", pattern=r"^[a-z_][a-z0-9_]{0,40}$", description="The schema that holds the live projections."
    )
    pool_size: int = Field(8, ge=1, description="Connections of one process, at most.")


class S3Settings(SectionModel):
    """The blobs that the log names by hash."""

    endpoint_url: str | None = Field(None, description="The store's address; AWS itself where it is not set.")
    region: str = Field("us-east-1", description="The region that requests are signed for.")
    bucket: str = Field("esper", description="The bucket for kernels and checkpoints.")
    access_key: SecretStr = Field(description="The key's id.")
    secret_key: SecretStr = Field(description="The key itself.")
    pool_size: int = Field(50, ge=1, description="Connections of one process, at most.")
    read_timeout_s: float = Field(
        10.0, gt=0, description="How long one request waits for the next byte before it is sent again, in seconds."
    )
    deadline_s: float = Field(
        30.0,
        gt=0,
        description="How long an operation may get nowhere, with all its retries, before it is given up, in seconds.",
    )


class LoggingSettings(SectionModel):
    """What is logged, and in which form."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="The least that is logged.")
    format: Literal["console", "json"] = Field("console", description="`console` for people, `json` for machines.")
