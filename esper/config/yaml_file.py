"""Reads a YAML settings file: its values, and the line of every key.

It is stricter than YAML: keys are scalars and appear once, the file holds one document, and the
document stays small when its aliases are expanded. Invariant: for any bytes the result is values or
a ConfigError.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from esper.config.sources import KeyPath, Origin, Sourced
from esper.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 30  # libyaml's composer overflows the stack at about ten thousand levels
MAX_VALUES = 10_000  # with aliases expanded: a few lines of aliases can expand to billions of values
MERGE_TAG = "tag:yaml.org,2002:merge"

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The C loader if PyYAML has it. Both loaders create only YAML's own types, never Python objects."""


def read_yaml(path: Path, loader: Any = LOADER) -> Sourced:
    """The values of a file whose top level is a mapping, and the line of each.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not a mapping, or sets a key twice.
    """
    text = _read_text(path)
    try:
        _check_depth(text, path, loader)
        opened = loader(text)
        try:
            return _Document(path, opened).read(opened.get_single_node())
        finally:
            opened.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces, not tabs" if mark and _has_tab(text, mark.line) else ""
        where = Origin(str(path), mark.line + 1 if mark else None)
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: invalid YAML: {reason}{hint}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: invalid YAML: control character at position {error.position}; remove it") from None
    except yaml.YAMLError:
        raise ConfigError(f"{path}: invalid YAML") from None


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES:,} bytes, the limit of a settings file; check the path")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _check_depth(text: str, path: Path, loader: Any) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path}:{event.start_mark.line + 1}: more than {MAX_DEPTH} nested levels")


def _has_tab(text: str, line: int) -> bool:
    lines = text.split("\n")
    return line < len(lines) and "\t" in lines[line][: len(lines[line]) - len(lines[line].lstrip())]


class _Document:
    """Converts the nodes of one file to values, and records their lines."""

    def __init__(self, path: Path, loader: Any) -> None:
        self._path = path
        self._loader = loader
        self._num_values = 0
        self._origins: dict[KeyPath, Origin] = {}

    def read(self, root: yaml.Node | None) -> Sourced:
        is_empty = root is None or (isinstance(root, yaml.ScalarNode) and root.value in ("", "~", "null"))
        if is_empty or root is None:
            return Sourced()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{self._at(root)}: the top level must be a mapping of sections")
        sections = self._value(root, ())
        return Sourced({name: section for name, section in sections.items() if section is not None}, self._origins)

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise ConfigError(f"{self._at(node)}: the file's aliases expand to too many values; write them out")
        if isinstance(node, yaml.MappingNode):
            return {key: self._value(value, (*path, key)) for key, value in self._pairs(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, self._record_origin((*path, str(n)), item)) for n, item in enumerate(node.value)]
        try:
            return self._loader.construct_object(node)
        except (ValueError, LookupError, AttributeError, ArithmeticError):  # an invalid date or `!!bool`
            raise ConfigError(f"{self._at(node)}: setting {'.'.join(path)!r} is not a valid value; quote it") from None

    def _pairs(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        lines: dict[str, Origin] = {}
        for key_node, value in node.value:
            where = self._at(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == MERGE_TAG:
                raise ConfigError(f"{where}: a key must be a plain word, not a list, a mapping or `<<`")
            key = key_node.value
            if key in lines:
                raise ConfigError(
                    f"{where}: {'.'.join((*path, key))!r} is set twice, first in line {lines[key].line}; remove one"
                )
            lines[key] = self._origins[(*path, key)] = where
            yield key, value

    def _record_origin(self, path: KeyPath, node: yaml.Node) -> KeyPath:
        self._origins[path] = self._at(node)
        return path

    def _at(self, node: yaml.Node) -> Origin:
        return Origin(str(self._path), node.start_mark.line + 1)
