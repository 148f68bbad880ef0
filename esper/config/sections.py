"""The sections that Esper itself needs: Kafka, Postgres, S3, logging.

Sections of services are in the services' own packages. Invariant: ``esper.redaction`` knows every
secret of a section from the moment the section exists.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from esper.redaction import remember_secret


class SectionModel(BaseModel):
    """Base of every settings section. It rejects unknown keys and never prints a secret.

    ``esper config docs`` prints the ``description`` of each field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    def model_post_init(self, _context: Any, /) -> None:
        """Register the section's secrets for masking in logs."""
        for value in self.__dict__.values():
            if isinstance(value, SecretStr):
                remember_secret(value.get_secret_value())


class KafkaSecurity(SectionModel):
    """Encryption and authentication of the connection to Kafka.

    Production should use ``SASL_SSL`` with one user per service.
    """

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="Connection protocol: SSL encrypts it, SASL authenticates the client by password."
    )
    mechanism: Literal["SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism; it must be the one that the broker has the user's password for."
    )
    username: str | None = Field(None, description="SASL user name; required if the protocol includes SASL.")
    password: SecretStr | None = Field(None, description="SASL password; required if the protocol includes SASL.")
    ca_file: Path | None = Field(
        None, description="PEM file of the CA that signed the broker's certificate. If not set, the system's CAs apply."
    )
    cert_file: Path | None = Field(
        None, description="PEM file of this client's certificate, for a broker that requires one."
    )
    key_file: Path | None = Field(None, description="PEM file of the private key of `cert_file`.")
    key_password: SecretStr | None = Field(None, description="Password that encrypts `key_file`.")

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.protocol.endswith("SSL")

    @property
    def uses_sasl(self) -> bool:
        """Whether the client authenticates with a user name and a password."""
        return self.protocol.startswith("SASL")

    @model_validator(mode="after")
    def _check_sasl_user(self) -> Self:
        missing = [name for name in ("username", "password") if getattr(self, name) is None]
        if self.uses_sasl and missing:
            variables = " and ".join(f"ESPER_KAFKA__SECURITY__{name.upper()}" for name in missing)
            raise ValueError(f"{self.protocol} needs username and password; set {variables}")
        return self


class KafkaSettings(SectionModel):
    """The Kafka cluster. Production should set `replication_factor` to 3 and `min_insync_replicas` to 2."""

    bootstrap_servers: str = Field(
        description="Brokers for the first connection, as `host:port`, comma-separated; name more than one."
    )
    security: KafkaSecurity = Field(
        KafkaSecurity.model_validate({}), description="Encryption and authentication of the connection."
    )
    replication_factor: int = Field(
        1, ge=1, description="Copies of each partition that `esper topics apply` requests; 1 survives no loss."
    )
    min_insync_replicas: int = Field(
        1, ge=1, description="Copies needed before a write is acknowledged; all of them: one broker down stops writes."
    )
    telemetry_retention_h: float = Field(
        72.0, gt=0, description="Hours for which Kafka keeps health signals; a rebuild cannot restore older ones."
    )


class PostgresSettings(SectionModel):
    """The database of the projections."""

    dsn: SecretStr = Field(description="Connection URL: `postgresql://user:password@host:port/database`.")
    schema_name: str = Field(
        "esper", pattern=r"^[a-z_][a-z0-9_]{0,40}$", description="Schema that holds the live projections."
    )
    pool_size: int = Field(
        8, ge=1, description="Maximum connections per process; all processes share the server's `max_connections`."
    )


class S3Settings(SectionModel):
    """The object store of kernels, checkpoints and policies."""

    endpoint_url: str | None = Field(None, description="URL of the object store. If not set, AWS S3.")
    region: str = Field("us-east-1", description="Region for which requests are signed.")
    bucket: str = Field("esper", description="Bucket of kernels, checkpoints and policies.")
    access_key: SecretStr = Field(description="Access key ID.")
    secret_key: SecretStr = Field(description="Secret access key.")
    pool_size: int = Field(50, ge=1, description="Maximum number of connections per process.")
    read_timeout_s: float = Field(
        10.0, gt=0, description="Seconds without a byte until a request is retried; too few overload a slow store."
    )
    deadline_s: float = Field(
        30.0, gt=0, description="Seconds without progress, over all retries, until an operation fails."
    )


class LoggingSettings(SectionModel):
    """Level and format of the log, which goes to stderr."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Lowest level that is logged.")
    format: Literal["console", "json"] = Field(
        "console", description="Format of log lines: `console` for people, `json` for log collectors."
    )
