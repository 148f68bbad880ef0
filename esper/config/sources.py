"""Sources of settings: environment variables, the running embedded stack, and how sources are merged.

This module owns the names of environment variables and the origin of each value. It does not know
the sections' models. Invariant: every value in a ``Sourced`` has an origin, either its own or that
of the nearest key above it.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from esper.errors import ConfigError

ENV_PREFIX = "ESPER_"
ENV_DELIMITER = "__"
STATE_DIR_VARIABLE = "ESPER_STATE_DIR"
CONFIG_VARIABLE = "ESPER_CONFIG"
NOT_SETTINGS = frozenset({STATE_DIR_VARIABLE, CONFIG_VARIABLE})
STACK_FILE = "stack.json"
STACK_SECTIONS = ("kafka", "postgres", "s3")

KeyPath = tuple[str, ...]
"""Keys from a section down to a value: ("kafka", "security", "protocol")."""

# Kubernetes sets these variables in every container for a service called esper-...
_KUBERNETES_VARIABLE = re.compile(r"ESPER_\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of a value: ``name`` is a file, a variable or the running stack; ``line`` counts from 1."""

    name: str
    line: int | None = None
    is_variable: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


@dataclass(frozen=True, slots=True)
class Sourced:
    """Nested values, with secrets in plain text, and the origin of each key path."""

    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    origins: Mapping[KeyPath, Origin] = field(default_factory=dict)

    def origin_of(self, path: KeyPath) -> Origin | None:
        """The origin of a value, or of the nearest key above it that has one."""
        return next((self.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.origins), None)

    def origin_near(self, path: KeyPath) -> Origin | None:
        """Like ``origin_of``; if variables alone set a section's keys, the origin of the first of them."""
        found = self.origin_of(path)
        for n in range(len(path), 0, -1):
            found = found or next((o for p, o in self.origins.items() if p[:n] == path[:n]), None)
        return found

    def over(self, under: "Sourced") -> "Sourced":
        """Merge this source over one of lower priority: mappings are merged, other values are replaced."""
        origins = {path: origin for path, origin in under.origins.items() if not self._replaces(path)}
        return Sourced(_merge(under.values, self.values), {**origins, **self.origins})

    def _replaces(self, path: KeyPath) -> bool:
        here: Any = self.values
        for part in path:
            if not isinstance(here, Mapping):
                return True
            if part not in here:
                return False
            here = here[part]
        return True


def state_dir() -> Path:
    """The folder of the embedded stack's state: ESPER_STATE_DIR, or the user's state folder."""
    return _state_dir_of(os.environ)


def variable_of(path: KeyPath) -> str:
    """The environment variable that sets the value at ``path``."""
    return ENV_PREFIX + ENV_DELIMITER.join(path).upper()


def read_stack(environ: Mapping[str, str]) -> Sourced:
    """The addresses of the running embedded stack; empty if none runs.

    Raises:
        ConfigError: the file that describes the stack cannot be read.
    """
    path = _state_dir_of(environ) / STACK_FILE
    try:
        stack = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return Sourced()
    except (OSError, ValueError):
        raise ConfigError(f"cannot read {path}, which describes the embedded stack; run `esper down`") from None
    if not isinstance(stack, dict):
        raise ConfigError(f"{path} does not describe an embedded stack; run `esper down`")
    values = {name: stack[name] for name in STACK_SECTIONS if isinstance(stack.get(name), dict)}
    origin = Origin("the running stack")
    return Sourced(values, {(name, key): origin for name, section in values.items() for key in section})


def read_environ(environ: Mapping[str, str]) -> Sourced:
    """The settings among the environment variables, as text; the section's model converts them.

    Raises:
        ConfigError: one variable sets a key and another one a key below it.
    """
    values: dict[str, Any] = {}
    origins: dict[KeyPath, Origin] = {}
    for variable in sorted(v for v in environ if v.startswith(ENV_PREFIX)):
        if variable in NOT_SETTINGS or _is_from_kubernetes(variable, environ[variable]):
            continue
        path = tuple(variable.removeprefix(ENV_PREFIX).lower().split(ENV_DELIMITER))
        here = values
        for n, key in enumerate(path[:-1], 1):
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                raise ConfigError(f"{variable} and {origins[path[:n]]} cannot both be set; unset one of them")
        here[path[-1]] = environ[variable]
        origins[path] = Origin(variable, is_variable=True)
    return Sourced(values, origins)


def _state_dir_of(environ: Mapping[str, str]) -> Path:
    named = environ.get(STATE_DIR_VARIABLE)
    return Path(named) if named else platformdirs.user_state_path("esper")


def _is_from_kubernetes(variable: str, value: str) -> bool:
    if ENV_DELIMITER in variable:
        return False
    is_address = variable.endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", value) is not None
    return is_address or _KUBERNETES_VARIABLE.fullmatch(variable) is not None


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merge(below, value)
        merged[key] = value
    return merged
