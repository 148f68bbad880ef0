"""Reads infra/stack.yml and infra/images without Docker."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from support.paths import INFRA

from esper.embedded.stack import EmbeddedStack

ADDRESS_SUFFIXES = ("BOOTSTRAP_SERVERS", "DSN", "ENDPOINT_URL", "ACCESS_KEY", "SECRET_KEY")
_REQUIRED = re.compile(r"\$\{\w+:\?[^}]+\}")
_OPTIONAL = re.compile(r"\$\{\w+:-([^}]*)\}")


def services() -> dict[str, dict[str, Any]]:
    """Every service of infra/stack.yml."""
    stack = yaml.safe_load((INFRA / "stack.yml").read_text())
    found: dict[str, dict[str, Any]] = {}
    for name in ("stack.yml", *stack["include"]):
        found |= yaml.safe_load((INFRA / name).read_text())["services"]
    return found


def own_services() -> dict[str, dict[str, Any]]:
    """The services that run an image of Esper."""
    return {name: service for name, service in services().items() if "build" in service}


def environment_of(service: Mapping[str, Any], required: str = "0123abcd") -> dict[str, str]:
    """Environment of a service, with the required variables of infra/.env filled in."""
    found = service.get("environment", {}).items()
    return {name: _OPTIONAL.sub(r"\1", _REQUIRED.sub(required, value)) for name, value in found}


def environment_here(name: str, stack: EmbeddedStack, folder: Path, **changes: str) -> dict[str, str]:
    """Environment of a service, with the addresses of another stack in the variables that it already has."""
    env, stack_environment = environment_of(own_services()[name]), stack.environment()
    addresses = {variable: stack_environment[variable] for variable in env if variable.endswith(ADDRESS_SUFFIXES)}
    return {**env, **addresses, "ESPER_STATE_DIR": str(folder / f"{name}-state"), **changes}


def stages(dockerfile: str) -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage of a Dockerfile, including its base stages; the last stage is named `last`."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", (INFRA / "images" / dockerfile).read_text(), flags=re.M))
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in filter(None, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name or "last"] = list(found.get(base, []))
        current.append((instruction, rest))
    return found


def image_of(service: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Instructions of the image of a service."""
    build = service["build"]
    return stages(Path(build["dockerfile"]).name)[build.get("target", "last")]


def last(instructions: list[tuple[str, str]], wanted: str) -> str:
    """Argument of the last instruction of a kind."""
    return [rest for instruction, rest in instructions if instruction == wanted][-1]


def image_environment(instructions: list[tuple[str, str]]) -> dict[str, str]:
    """Environment variables that an image sets."""
    pairs = [pair for instruction, rest in instructions if instruction == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


def image_check(instructions: list[tuple[str, str]]) -> list[str]:
    """Command of an image's HEALTHCHECK."""
    return list(json.loads(last(instructions, "HEALTHCHECK").partition(" CMD ")[2]))
