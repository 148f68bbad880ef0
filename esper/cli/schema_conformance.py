"""Validation of records against the published JSON Schemas with the jsonschema library.

Reads the files in ``schemas/json`` as a program in another language would, and imports no model of Esper's.
``esper.oona.cloudevents.decode`` decides whether Esper itself can read a record.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.config import KafkaSettings
from esper.errors import ConfigError, ContractError
from esper.schemas.specs.asyncapi import document
from esper.schemas.specs.contract_set import PUBLISHED
from esper.schemas.topics import TOPICS, TopicSpec

MAX_PROBLEMS = 20
MAX_PROBLEM_CHARS = 300


@dataclass(slots=True)
class Tally:
    """Valid records by type, and the problems of the first ``MAX_PROBLEMS`` records that do not conform."""

    num_valid: Counter[str] = field(default_factory=Counter)
    num_broken: int = 0
    problems: list[str] = field(default_factory=list)

    def raise_if_broken(self) -> None:
        """Raise if any record does not conform.

        Raises:
            ContractError: lists the problems.
        """
        if self.num_broken:
            raise ContractError(
                "\n  ".join([f"{self.num_broken} record(s) do not conform to their schema:", *self.problems])
            )


class PublishedSchemas:
    """Validators of every published event type and of the headers.

    Raises:
        ConfigError: the jsonschema package is not installed.
    """

    def __init__(self, folder: Path = PUBLISHED) -> None:
        try:
            from jsonschema import Draft202012Validator as Validator
        except ImportError as error:
            raise ConfigError("jsonschema is not installed and validation needs it: pip install jsonschema") from error
        self._values = {p.stem: Validator(json.loads(p.read_text(encoding="utf-8"))) for p in folder.glob("*.json")}
        self._headers = Validator(document("")["components"]["schemas"]["cloudEventHeaders"])

    def problems(self, headers: Mapping[str, str], value: str | bytes | None) -> Iterator[str]:
        """Descriptions of what is wrong with a record; none if it conforms."""
        yield from _schema_errors(self._headers, dict(headers), "headers")
        validator = self._values.get(headers.get("ce_type", ""))
        if validator is None:
            yield f"no schema is published for type {headers.get('ce_type')!r}"
            return
        try:
            parsed = json.loads(value or b"", parse_constant=_refuse)
        except ValueError as error:
            yield f"the value is not JSON: {error}"
            return
        yield from _schema_errors(validator, parsed, "value")

    def count(self, tally: Tally, where: str, headers: Mapping[str, str], value: str | bytes | None) -> None:
        """Validate a record and count it in ``tally``. ``where`` names the record in problems."""
        found = [p[:MAX_PROBLEM_CHARS] for p in self.problems(headers, value)]
        if not found:
            tally.num_valid[headers["ce_type"]] += 1
            return
        tally.num_broken += 1
        if len(tally.problems) < MAX_PROBLEMS:
            tally.problems.append(f"{where}: {'; '.join(found)}")


def validate_lines(lines: Iterable[str]) -> Tally:
    """Validate lines of `esper events tail --json`.

    Raises:
        ConfigError: a line has another format.
    """
    schemas, tally = PublishedSchemas(), Tally()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            schemas.count(tally, f"line {number}", record["headers"], record["value"])
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"line {number} is not a line of `esper events tail --json`: {error!r}") from error
    return tally


async def validate_log(kafka: KafkaSettings, topics: Iterable[TopicSpec] = TOPICS, *, key: str | None = None) -> Tally:
    """Validate the records that these topics hold now, all of them or those with one key (a run's id).

    Raises:
        UnavailableError: no broker answers.
    """
    from esper.oona.log_reader import partition_of, read_range

    schemas, tally = PublishedSchemas(), Tally()
    for topic in topics:
        partition = None if key is None else partition_of(key, topic)
        async for record in read_range(kafka, topic, partition=partition):
            if key is None or record.key == key.encode():
                headers = {n: (text or b"").decode(errors="replace") for n, text in record.headers}
                where = f"{topic.name}[{record.position.partition}]@{record.position.offset}"
                schemas.count(tally, where, headers, record.value)
    return tally


def _schema_errors(validator: Any, value: object, name: str) -> Iterator[str]:
    for error in validator.iter_errors(value):
        yield f"{name}{error.json_path.removeprefix('$')}: {error.message}"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
