"""What `esper config` prints: every setting with value and origin, and the reference page of all settings.

Invariant: no row holds the value of a secret.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from esper.config.sections import SectionModel
from esper.config.settings import SECTIONS, Settings, get_service_config, section_model
from esper.config.sources import CONFIG_VARIABLE, STATE_DIR_VARIABLE, KeyPath, variable_of
from esper.config.validation_errors import is_secret_field, section_in
from esper.errors import ConfigError
from esper.redaction import MASK, mask_text

DEFAULT = "default"

_PAGE_HEAD = f"""# Settings
`esper config docs` prints this page from the code; a test compares them.

Esper reads settings from three sources. The first one that sets a key wins:

1. Environment variables. A name is `ESPER_`, then the section and the key in capitals, joined by `__`:
   `ESPER_TRAINER__LINK__BOUNDARY_STEPS=100`.
2. The YAML file: `esper --config FILE`, or the path in `{CONFIG_VARIABLE}`.
3. The embedded stack that `esper up` started, for the addresses of Kafka, Postgres and S3. It is found through the
   folder in `{STATE_DIR_VARIABLE}`, or the user's state folder.

Put secrets into environment variables, never into a file that others can read.

`esper config show` prints every setting with its value and its origin. `esper config check FILE` validates a file. In
Python, `esper.config.get_service_config("tamiyo")` returns one section, validated.
"""


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One setting. ``value`` is masked if it is a secret; ``origin`` names the source that set it."""

    key: str
    value: Any
    origin: str

    @property
    def shown(self) -> str:
        """The value, for people."""
        return "not set" if self.value is None else str(self.value)


def configured_sections(settings: Settings) -> tuple[str, ...]:
    """The sections that have values: all except Kafka, Postgres and S3 if no source sets them."""
    return tuple(name for name in SECTIONS if getattr(settings, name, True) is not None)


def list_settings(settings: Settings, sections: Iterable[str]) -> list[SettingRow]:
    """Every setting of the named sections, validated.

    Raises:
        ConfigError: a key is unknown or has a wrong value, or no source sets a section.
    """
    return [row for name in sections for row in _rows(get_service_config(name, settings), (name,), settings)]


def check_all(settings: Settings) -> None:
    """Validate every section, including those of services.

    Raises:
        ConfigError: keys are unknown or have wrong values; one line for each, of all sections.
    """
    errors = []
    for name in configured_sections(settings):
        try:
            get_service_config(name, settings)
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))


def markdown() -> str:
    """The page docs/deployment/configuration.md."""
    parts = [_PAGE_HEAD]
    for name in SECTIONS:
        model = section_model(name)
        parts.append(f"\n## {name}\n{_first_line(model)}\n\n| key | type | default | description | variable |\n")
        parts.append("|---|---|---|---|---|\n")
        parts.extend(_table_rows(model, (name,)))
    return "".join(parts)


def _rows(section: SectionModel, path: KeyPath, settings: Settings) -> Iterator[SettingRow]:
    for name, field in _fields(type(section)):
        value, here = getattr(section, name), (*path, name)
        if isinstance(value, SectionModel):
            yield from _rows(value, here, settings)
        else:
            yield SettingRow(".".join(here), _shown(value, field, name), _origin(settings, here, value, field))


def _fields(model: type[SectionModel]) -> list[tuple[str, FieldInfo]]:
    """Name and definition of each field: the section's own fields first, then inherited ones."""
    return sorted(model.model_fields.items(), key=lambda item: item[0] not in model.__annotations__)


def _shown(value: Any, field: FieldInfo, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return MASK if value is not None and is_secret_field(field, name) else value
    is_secret = value != "" and is_secret_field(field, name)  # an empty value reveals nothing
    return MASK if is_secret else mask_text(str(value))


def _origin(settings: Settings, path: KeyPath, value: Any, field: FieldInfo) -> str:
    here: Any = settings.sourced.values
    for part in path:
        if not isinstance(here, Mapping) or part not in here:
            return DEFAULT if value == field.default else settings.source
        here = here[part]
    return str(settings.sourced.origin_of(path) or settings.source)


def _table_rows(model: type[SectionModel], path: KeyPath) -> Iterator[str]:
    for name, field in _fields(model):
        here, section = (*path, name), section_in(field)
        if section is not None:
            yield from _table_rows(section, here)
            continue
        key = ".".join(here[1:])
        default = "required" if field.is_required() else _code(field.default)
        yield f"| `{key}` | {_type(field)} | {default} | {field.description} | `{variable_of(here)}` |\n"


def _type(field: FieldInfo) -> str:
    return f"{_type_name(field.annotation)}{_limits(field)}".replace("|", "\\|")


def _type_name(annotation: Any) -> str:
    is_enum = isinstance(annotation, type) and issubclass(annotation, StrEnum)
    if is_enum or get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in (list(annotation) if is_enum else get_args(annotation)))
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return " or ".join(_type_name(a) for a in get_args(annotation) if a is not type(None))
    names = {SecretStr: "secret", str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _limits(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs.items() if hasattr(m, name)]
    limits += [f"`{m.pattern}`" for m in field.metadata if getattr(m, "pattern", None)]
    return f" {', '.join(limits)}" if limits else ""


def _code(value: Any) -> str:
    return "not set" if value is None else f"`{value}`"


def _first_line(model: type[SectionModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0].replace("``", "`")
