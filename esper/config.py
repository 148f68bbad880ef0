"""Where everything is, and how it is set: one settings object, read once by an entry point.

Sources, strongest first: ESPER_ variables (``ESPER_KAFKA__BOOTSTRAP_SERVERS``), the YAML
file, and the embedded stack that ``esper up`` left running, for what nothing else names.
The sections of services (``tamiyo``, ``urza``, ``trainer``, ...) belong to their owners: they
stay raw here, and ``Settings.section`` checks one on demand.
"""

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from esper.errors import ConfigError

ENV_PREFIX = "ESPER_"
ENV_DELIMITER = "__"
STATE_DIR_VARIABLE = "ESPER_STATE_DIR"
CONFIG_VARIABLE = "ESPER_CONFIG"
STACK_FILE = "stack.json"
OWNED_SECTIONS = ("streams", "tamiyo", "urza", "trainer")

_Section = TypeVar("_Section", bound=BaseModel)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class SectionModel(BaseModel):
    """Base of every settings section: a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSecurity(SectionModel):
    """How the broker lets this process in. Production wants ``SASL_SSL``, a user for each service.

    ``ca_file`` is the authority that signed the broker's certificate (the system's own where it is
    None); ``cert_file`` and ``key_file`` are for a broker that asks for a client's certificate.
    """

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    mechanism: Literal["SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    username: str | None = None
    password: SecretStr | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    key_password: SecretStr | None = None

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
        if self.uses_sasl and (self.username is None or self.password is None):
            raise ValueError(f"{self.protocol} needs username and password")
        return self


class KafkaSettings(SectionModel):
    """The broker. Production wants ``replication_factor`` 3 and ``min_insync_replicas`` 2."""

    bootstrap_servers: str
    security: KafkaSecurity = KafkaSecurity()
    replication_factor: int = Field(1, ge=1)
    min_insync_replicas: int = Field(1, ge=1)
    telemetry_retention_h: float = Field(72.0, gt=0)


class PostgresSettings(SectionModel):
    """The projections. ``schema_name`` holds the live ones."""

    dsn: SecretStr
    schema_name: str = Field("esper", pattern=r"^[a-z_][a-z0-9_]{0,40}$")
    pool_size: int = Field(8, ge=1)


class S3Settings(SectionModel):
    """The blobs that the log names by hash."""

    endpoint_url: str | None = None
    region: str = "us-east-1"
    bucket: str = "esper"
    access_key: SecretStr
    secret_key: SecretStr
    pool_size: int = Field(50, ge=1)


class LoggingSettings(SectionModel):
    """``format`` is ``console`` for people, ``json`` for machines."""

    level: str = Field("INFO", pattern=r"^(DEBUG|INFO|WARNING|ERROR)$")
    format: str = Field("console", pattern=r"^(console|json)$")


class Settings(SectionModel):
    """All settings. An address that no source names is None until somebody needs it."""

    kafka: KafkaSettings | None = None
    postgres: PostgresSettings | None = None
    s3: S3Settings | None = None
    logging: LoggingSettings = LoggingSettings.model_validate({})
    owned: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict, repr=False)
    source: str = "defaults"

    def need_kafka(self) -> KafkaSettings:
        """The broker's settings.

        Raises:
            ConfigError: no source names a broker.
        """
        return self.kafka or _not_named("Kafka", "KAFKA__BOOTSTRAP_SERVERS")

    def need_postgres(self) -> PostgresSettings:
        """The database's settings.

        Raises:
            ConfigError: no source names a database.
        """
        return self.postgres or _not_named("Postgres", "POSTGRES__DSN")

    def need_s3(self) -> S3Settings:
        """The object store's settings.

        Raises:
            ConfigError: no source names an object store.
        """
        return self.s3 or _not_named("S3", "S3__ENDPOINT_URL")

    def section(self, name: str, model: type[_Section]) -> _Section:
        """The section of a service, checked by its owner's model.

        Raises:
            ConfigError: a key in it is unknown or wrong.
        """
        return _checked(model, dict(self.owned.get(name, {})), self.source, (name,))


def _not_named(what: str, variable: str) -> Any:
    raise ConfigError(f"no {what} is named: start the embedded stack with `esper up`, or set {ENV_PREFIX}{variable}")


def state_dir() -> Path:
    """Where the embedded stack keeps its state: ESPER_STATE_DIR, or the user's state folder."""
    named = os.environ.get(STATE_DIR_VARIABLE)
    return Path(named) if named else platformdirs.user_state_path("esper")


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read all sources once.

    Args:
        path: the YAML file; ESPER_CONFIG where it is None, and no file where that is unset.
        environ: the variables to read, ``os.environ`` by default.

    Raises:
        ConfigError: a file cannot be read, or a key is unknown or wrong; names file, line and
            the nearest key that is right.
    """
    environ = os.environ if environ is None else environ
    named = path or (Path(environ[CONFIG_VARIABLE]) if CONFIG_VARIABLE in environ else None)
    values = _merge(_read_stack(environ), read_yaml(named) if named else {})
    values = _merge(values, _read_environ(environ))
    source = str(named) if named else "the environment"
    _refuse_unknown(values, (*Settings.model_fields, *OWNED_SECTIONS), source, named)
    owned = {name: values.pop(name) for name in OWNED_SECTIONS if name in values}
    return _checked(Settings, {**values, "owned": owned, "source": source}, source, ())


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is no mapping.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections")
    return loaded


def _read_stack(environ: Mapping[str, str]) -> dict[str, Any]:
    folder = Path(environ[STATE_DIR_VARIABLE]) if STATE_DIR_VARIABLE in environ else state_dir()
    try:
        stack = json.loads((folder / STACK_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {folder / STACK_FILE}: {error}; run `esper down`") from error
    return {name: stack[name] for name in ("kafka", "postgres", "s3") if name in stack}


def _read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or ENV_DELIMITER not in variable:
            continue
        *folders, leaf = variable.removeprefix(ENV_PREFIX).lower().split(ENV_DELIMITER)
        here = values
        for folder in folders:
            here = here.setdefault(folder, {})
        here[leaf] = text
    return values


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(dict(below or {}), value) if both else value
    return merged


def _checked(model: type[_Section], values: Mapping[str, Any], source: str, at: tuple[str, ...]) -> _Section:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, e, source, at) for e in error.errors())) from None


def _explain(model: type[BaseModel], error: Any, source: str, at: tuple[str, ...]) -> str:
    place = tuple(str(p) for p in error["loc"])
    key = ".".join((*at, *place))
    line = _line_of(Path(source), (*at, *place))
    where = f"{source}:{line}" if line else source
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown setting {key!r}{_nearest(place[-1], _keys_at(model, place[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: setting {key!r} is missing"
    return f"{where}: setting {key!r}: {error['msg']}"


def _keys_at(model: Any, place: tuple[str, ...]) -> tuple[str, ...]:
    for part in place:
        field = getattr(model, "model_fields", {}).get(part)
        members = (field.annotation, *getattr(field.annotation, "__args__", ())) if field else ()
        model = next((m for m in members if hasattr(m, "model_fields")), None)
    return tuple(getattr(model, "model_fields", {}))


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], source: str, path: Path | None) -> None:
    hidden = {"owned", "source"}
    for key in values:
        if key not in known or key in hidden:
            line = _line_of(path, (key,)) if path else None
            where = f"{source}:{line}" if line else source
            shown = tuple(k for k in known if k not in hidden)
            raise ConfigError(f"{where}: unknown section {key!r}{_nearest(str(key), shown)}")


def _line_of(path: Path, place: tuple[str, ...]) -> int | None:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, yaml.YAMLError):
        return None
    line = None
    for part in place:
        if not isinstance(node, yaml.MappingNode):
            break
        pair = next(((k, v) for k, v in node.value if k.value == part), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line
