"""Settings: all sections of one process, read once from all sources.

This module owns the list of sections. The models of service sections (``tamiyo``, ``urza``,
``trainer``, ...) belong to the services. Services import this module, so it names their models by
import path and imports them on first use; until then their values stay unvalidated. Invariant: a
``Settings`` object has no unknown section, and its ``kafka``, ``postgres``, ``s3`` and ``logging``
sections are valid.
"""

import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, overload

from pydantic import Field, PrivateAttr, ValidationError

from esper.config.sections import KafkaSettings, LoggingSettings, PostgresSettings, S3Settings, SectionModel
from esper.config.sources import CONFIG_VARIABLE, KeyPath, Sourced, read_environ, read_stack
from esper.config.validation_errors import error_lines, missing_section, not_a_section, unknown_section
from esper.config.yaml_file import read_yaml
from esper.errors import ConfigError

SERVICE_MODELS: Mapping[str, str] = {
    "streams": "esper.streams.settings:StreamsSettings",
    "tamiyo": "esper.services.tamiyo.settings:TamiyoSettings",
    "urza": "esper.services.urza.settings:UrzaSettings",
    "trainer": "esper.services.tolaria.settings:TrainerSettings",
}
"""Name of a service's section -> import path of its model."""

_MODELS: Mapping[str, type[SectionModel]] = {
    "kafka": KafkaSettings,
    "postgres": PostgresSettings,
    "s3": S3Settings,
    "logging": LoggingSettings,
}
SERVICE_SECTIONS = tuple(SERVICE_MODELS)
SECTIONS = (*_MODELS, *SERVICE_SECTIONS)

_Section = TypeVar("_Section", bound=SectionModel)


class Settings(SectionModel):
    """All settings of a process. ``kafka``, ``postgres`` and ``s3`` are None if no source sets them.

    ``service_sections`` has the unvalidated values of the services' sections; ``section`` validates them.
    """

    kafka: KafkaSettings | None = None
    postgres: PostgresSettings | None = None
    s3: S3Settings | None = None
    logging: LoggingSettings = LoggingSettings.model_validate({})
    service_sections: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict, repr=False, exclude=True)
    source: str = "defaults"
    _sourced: Sourced = PrivateAttr(default_factory=Sourced)

    @property
    def sourced(self) -> Sourced:
        """The unvalidated values, with secrets in plain text, and the origin of each."""
        return self._sourced

    @classmethod
    def of(cls, sourced: Sourced, source: str) -> Self:
        """Validate the sections that Esper itself needs; keep those of services for ``section``.

        Raises:
            ConfigError: keys are unknown or have wrong values; one line for each.
        """
        validated_here = {name: sourced.values[name] for name in _MODELS if name in sourced.values}
        errors = _top_level_errors(sourced)
        of_services = {name: sourced.values[name] for name in SERVICE_SECTIONS if name in sourced.values}
        try:
            settings = cls.model_validate(
                {**validated_here, "service_sections": {} if errors else of_services, "source": source}
            )
        except ValidationError as error:
            errors += error_lines(cls, error, sourced, ())
        if errors:
            raise ConfigError("\n".join(errors))
        settings._sourced = sourced
        return settings

    def need_kafka(self) -> KafkaSettings:
        """The Kafka section; raises ConfigError if no source sets it."""
        return _required(self.kafka, "Kafka", ("kafka", "bootstrap_servers"))

    def need_postgres(self) -> PostgresSettings:
        """The Postgres section; raises ConfigError if no source sets it."""
        return _required(self.postgres, "Postgres", ("postgres", "dsn"))

    def need_s3(self) -> S3Settings:
        """The S3 section; raises ConfigError if no source sets it."""
        return _required(self.s3, "S3", ("s3", "endpoint_url"))

    def section(self, name: str, model: type[_Section]) -> _Section:
        """The section of a service, validated by the service's model.

        Raises:
            ConfigError: keys in it are unknown or have wrong values; one line for each.
        """
        try:
            return model.model_validate(dict(self.service_sections.get(name, {})))
        except ValidationError as error:
            errors = error_lines(model, error, self._sourced, (name,))
        raise ConfigError("\n".join(errors))


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read all sources once.

    Args:
        path: the YAML file. None takes the path in ESPER_CONFIG, or no file if that is unset.
        environ: environment variables to read, ``os.environ`` by default.

    Raises:
        ConfigError: a file cannot be read, or a key is unknown or has a wrong value. Each line
            names file and line number, or the variable, and the most similar known key.
    """
    environ = os.environ if environ is None else environ
    named = path or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    file = read_yaml(named) if named else Sourced()
    sourced = read_environ(environ).over(file.over(read_stack(environ)))
    return Settings.of(sourced, str(named) if named else "the environment")


def section_model(name: str) -> type[SectionModel]:
    """The model of a section; a service's model is imported by this call.

    Raises:
        ConfigError: no section has this name.
    """
    if name in _MODELS:
        return _MODELS[name]
    if name not in SERVICE_MODELS:
        raise ConfigError(unknown_section((name,), SECTIONS, None))
    model: type[SectionModel] = pkgutil.resolve_name(SERVICE_MODELS[name])
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
    """One section of the settings, validated.

    Args:
        name: kafka, postgres, s3, logging, streams, tamiyo, urza or trainer.
        settings: settings to take it from; None reads all sources.

    Raises:
        ConfigError: the section does not exist, no source sets it, or a key in it is unknown or
            has a wrong value.
    """
    model = section_model(name)
    settings = load_settings() if settings is None else settings
    needs = {"kafka": settings.need_kafka, "postgres": settings.need_postgres, "s3": settings.need_s3}
    if name in needs:
        return needs[name]()
    return settings.logging if name == "logging" else settings.section(name, model)


def _top_level_errors(sourced: Sourced) -> list[str]:
    """One line for each unknown section, and for each value in place of a section."""
    errors = []
    for name, value in sourced.values.items():
        path: KeyPath = (name,)
        while name not in SECTIONS and isinstance(value, Mapping) and path not in sourced.origins:
            key, value = next(iter(value.items()))
            path = (*path, key)
        origin = sourced.origin_of(path)
        if name not in SECTIONS:
            errors.append(unknown_section(path, SECTIONS, origin))
        elif name in SERVICE_MODELS and not isinstance(value, Mapping):
            errors.append(not_a_section(path, section_model(name).model_fields, origin))
    return errors


def _required(section: _Section | None, service: str, path: KeyPath) -> _Section:
    if section is None:
        raise ConfigError(missing_section(service, path))
    return section
