"""Sets of contracts as data: each type's schema, topic and key, and each topic's partitions and retention.

``schemas/json`` publishes the set of the current models; ``schemas/released`` has the set that other programs rely
on. ``compatibility`` compares the two.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esper.schemas.registry import REGISTRY, Registry
from esper.schemas.specs.json_schema import schema_of
from esper.schemas.topics import TOPICS, TopicSpec

FOLDER = Path(__file__).parents[1]
PUBLISHED = FOLDER / "json"
RELEASED = FOLDER / "released"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class TypeContract:
    """One event type: its topic, the field that has the record key, its JSON Schema."""

    topic: str
    key_field: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TopicContract:
    """One topic. ``retention_ms`` is -1 where records are kept forever."""

    num_partitions: int
    retention_ms: int


@dataclass(frozen=True, slots=True)
class ContractSet:
    """Types and topics by name."""

    types: Mapping[str, TypeContract]
    topics: Mapping[str, TopicContract]


def contracts_of(registry: Registry = REGISTRY, topics: Iterable[TopicSpec] = TOPICS) -> ContractSet:
    """The contracts of the current models."""
    return ContractSet(
        {t: TypeContract(r.topic.name, r.key_field, schema_of(r.model)) for t, r in registry.items()},
        {t.name: TopicContract(t.num_partitions, t.retention_ms) for t in topics},
    )


def with_released(current: ContractSet, released: ContractSet) -> ContractSet:
    """``current``, plus the types that only ``released`` has: old versions, whose records stay in the log."""
    return ContractSet({**released.types, **current.types}, {**released.topics, **current.topics})


def files_of(contracts: ContractSet) -> dict[str, str]:
    """File name -> text of each type's schema."""
    return {f"{name}.json": _text(contract.schema) for name, contract in sorted(contracts.types.items())}


def write_released(contracts: ContractSet, folder: Path = RELEASED) -> None:
    """Write schemas and manifest; other files of the folder stay."""
    folder.mkdir(exist_ok=True)
    types = {n: {"topic": t.topic, "key_field": t.key_field} for n, t in sorted(contracts.types.items())}
    topics = {name: asdict(topic) for name, topic in contracts.topics.items()}
    for name, text in {**files_of(contracts), MANIFEST: _text({"topics": topics, "types": types})}.items():
        (folder / name).write_text(text, encoding="utf-8")


def read_released(folder: Path = RELEASED) -> ContractSet:
    """The set that ``write_released`` wrote; an empty one before the first release."""
    if not (folder / MANIFEST).exists():
        return ContractSet({}, {})
    manifest = _read(folder / MANIFEST)
    return ContractSet(
        {
            name: TypeContract(**entry, schema=_read(folder / f"{name}.json"))
            for name, entry in manifest["types"].items()
        },
        {name: TopicContract(**entry) for name, entry in manifest["topics"].items()},
    )


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
