"""Settings: all sections of one process, read once from all sources.

Owns which sections there are. Those of services (``tamiyo``, ``urza``, ``trainer``, ...) belong to
their owners and stay raw here: imports point from services to settings, so an owner's model is
named by its path and imported when somebody asks for it. Invariant: a ``Settings`` that exists has
no unknown section and no wrong value in the sections of its own.
"""

import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, overload

from pydantic import Field, PrivateAttr, ValidationError

from esper.config.sections import KafkaSettings, LoggingSettings, PostgresSettings, S3Settings, SectionModel
from esper.config.sources import CONFIG_VARIABLE, KeyPath, Sourced, read_environ, read_stack
from esper.config.validation_errors import complaints, lone_section, not_named, unknown_section
from esper.config.yaml_file import read_yaml
from esper.errors import ConfigError

OWNERS: Mapping[str, str] = {
    "streams": "esper.streams.settings:StreamsSettings",
    "tamiyo": "esper.services.tamiyo.settings:TamiyoSettings",
    "urza": "esper.services.urza.settings:UrzaSettings",
    "trainer": "esper.services.tolaria.settings:TrainerSettings",
}
"""Section of a service -> where its model is."""

_MODELS: Mapping[str, type[SectionModel]] = {
    "kafka": KafkaSettings,
    "postgres": PostgresSettings,
    "s3": S3Settings,
    "logging": LoggingSettings,
}
OWNED_SECTIONS = tuple(OWNERS)
SECTIONS = (*_MODELS, *OWNED_SECTIONS)

_Section = TypeVar("_Section", bound=SectionModel)


class Settings(SectionModel):
    """All settings. An address that no source names is None until somebody needs it."""

    kafka: KafkaSettings | None = None
    postgres: PostgresSettings | None = None
    s3: S3Settings | None = None
    logging: LoggingSettings = LoggingSettings.model_validate({})
    owned: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict, repr=False, exclude=True)
    source: str = "defaults"
    _sourced: Sourced = PrivateAttr(default_factory=Sourced)

    @property
    def sourced(self) -> Sourced:
        """The raw values, secrets in the clear, and where each came from."""
        return self._sourced

    @classmethod
    def of(cls, sourced: Sourced, source: str) -> Self:
        """Check the sections that Esper itself needs; keep those of services for their owners.

        Raises:
            ConfigError: a key is unknown or wrong; one line for each.
        """
        own = {name: sourced.values[name] for name in _MODELS if name in sourced.values}
        wrong = _misplaced(sourced)
        owned = {name: sourced.values[name] for name in OWNED_SECTIONS if name in sourced.values}
        try:
            settings = cls.model_validate({**own, "owned": {} if wrong else owned, "source": source})
        except ValidationError as error:
            wrong += complaints(cls, error, sourced, ())
        if wrong:
            raise ConfigError("\n".join(wrong))
        settings._sourced = sourced
        return settings

    def need_kafka(self) -> KafkaSettings:
        """The broker's settings.

        Raises:
            ConfigError: no source names a broker.
        """
        return _named(self.kafka, "Kafka", ("kafka", "bootstrap_servers"))

    def need_postgres(self) -> PostgresSettings:
        """The database's settings.

        Raises:
            ConfigError: no source names a database.
        """
        return _named(self.postgres, "Postgres", ("postgres", "dsn"))

    def need_s3(self) -> S3Settings:
        """The object store's settings.

        Raises:
            ConfigError: no source names an object store.
        """
        return _named(self.s3, "S3", ("s3", "endpoint_url"))

    def section(self, name: str, model: type[_Section]) -> _Section:
        """The section of a service, checked by its owner's model.

        Raises:
            ConfigError: a key in it is unknown or wrong.
        """
        try:
            return model.model_validate(dict(self.owned.get(name, {})))
        except ValidationError as error:
            wrong = complaints(model, error, self._sourced, (name,))
        raise ConfigError("\n".join(wrong))


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read all sources once.

    Args:
        path: the YAML file; ESPER_CONFIG where it is None, and no file where that is unset.
        environ: the variables to read, ``os.environ`` by default.

    Raises:
        ConfigError: a file cannot be read, or a key is unknown or wrong; names file and line, or
            the variable, and the nearest key that is right.
    """
    environ = os.environ if environ is None else environ
    named = path or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    file = read_yaml(named) if named else Sourced()
    sourced = read_environ(environ).over(file.over(read_stack(environ)))
    return Settings.of(sourced, str(named) if named else "the environment")


def section_model(name: str) -> type[SectionModel]:
    """The model of a section. That of a service is imported now.

    Raises:
        ConfigError: no section has this name.
    """
    if name in _MODELS:
        return _MODELS[name]
    if name not in OWNERS:
        raise ConfigError(unknown_section((name,), SECTIONS, None))
    model: type[SectionModel] = pkgutil.resolve_name(OWNERS[name])
    return model


@overload
def get_service_config(name: Literal["kafka"], settings: Settings | None = None) -> KafkaSettings: ...
@overload
def get_service_config(name: Literal["postgres"], settings: Settings | None = None) -> PostgresSettings: ...
@overload
def get_service_config(name: Literal["s3"], settings: Settings | None = None) -> S3Settings: ...
@overload
def get_service_config(name: Literal["logging"], settings: Settings | None = None) -> LoggingSettings: ...
@overload
def get_service_config(name: str, settings: Settings | None = None) -> Any: ...
def get_service_config(name: str, settings: Settings | None = None) -> Any:
    """The checked section of a service by its name: one of ``SECTIONS``.

    Args:
        name: kafka, postgres, s3, logging, streams, tamiyo, urza or trainer.
        settings: where to look; all sources are read where it is None.

    Raises:
        ConfigError: no such section, no source names it, or a key is unknown or wrong.
    """
    model = section_model(name)
    settings = load_settings() if settings is None else settings
    needs = {"kafka": settings.need_kafka, "postgres": settings.need_postgres, "s3": settings.need_s3}
    if name in needs:
        return needs[name]()
    return settings.logging if name == "logging" else settings.section(name, model)


def _misplaced(sourced: Sourced) -> list[str]:
    """What is wrong with the top level: sections nobody has, values where sections must be."""
    wrong = []
    for name, value in sourced.values.items():
        path: KeyPath = (name,)
        while name not in SECTIONS and isinstance(value, Mapping) and path not in sourced.origins:
            key, value = next(iter(value.items()))
            path = (*path, key)
        origin = sourced.origin_of(path)
        if name not in SECTIONS:
            wrong.append(unknown_section(path, SECTIONS, origin))
        elif name in OWNERS and not isinstance(value, Mapping):
            wrong.append(lone_section(path, section_model(name).model_fields, origin))
    return wrong


def _named(section: _Section | None, what: str, path: KeyPath) -> _Section:
    if section is None:
        raise ConfigError(not_named(what, path))
    return section
