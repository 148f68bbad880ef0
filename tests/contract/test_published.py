"""Published schemas: they match the models, pass validators of others, and accept exactly the decodable values."""

import copy
import gzip
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.events import golden_records
from support.events.contract_strategies import values_of
from support.events.event_examples import BY_TYPE, EXAMPLES, decode_or_error, registrations_on, wrap_event
from typer.testing import CliRunner

from esper.cli import schema, schema_conformance
from esper.cli.app import app
from esper.errors import ConfigError, ContractError, DecodeError
from esper.oona.cloudevents import encode
from esper.schemas import topics
from esper.schemas.registry import REGISTRY
from esper.schemas.specs.contract_set import PUBLISHED

HERE = Path(__file__).parent
BEYOND_SCHEMAS = ("must be the report's", "must be the kernel's")


@cache
def validator(event_type: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((PUBLISHED / f"{event_type}.json").read_text()))


def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(schema.ASYNCAPI_FILE.read_text())
    return found


def test_published_files_match_the_models() -> None:
    on_disk = {p: p.read_text() if p.exists() else None for p in schema.published()}
    assert on_disk == schema.published(), "run `esper schema write`"
    assert set(PUBLISHED.glob("*.json")) == {p for p in on_disk if p.suffix == ".json"}


def test_published_schemas_pass_check_jsonschema() -> None:
    files = sorted(map(str, PUBLISHED.glob("*.json")))
    command = [str(Path(sys.executable).parent / "check-jsonschema"), "--check-metaschema", *files]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_document_conforms_to_the_asyncapi_schema() -> None:
    with gzip.open(HERE / "asyncapi" / "3.0.0.json.gz") as file:
        asyncapi = json.load(file)
    jsonschema.Draft7Validator(asyncapi).validate(document())
    broken = document()
    broken["channels"]["system.runs"]["bindings"]["kafka"]["partitions"] = 0
    assert not jsonschema.Draft7Validator(asyncapi).is_valid(broken)


def test_document_has_every_topic_and_type_and_valid_refs() -> None:
    published = document()
    for spec in topics.all_topics():
        binding = published["channels"][spec.name]["bindings"]["kafka"]
        kept = binding["topicConfiguration"]["retention.ms"]
        assert (binding["topic"], binding["partitions"], kept) == (spec.name, spec.num_partitions, spec.retention_ms)
    assert len(published["channels"]) == len(topics.all_topics())
    for spec in topics.TOPICS:
        old = [t for t in REGISTRY.upcasters if REGISTRY.find(t).topic == spec]
        assert list(published["channels"][spec.name]["messages"]) == [r.type for r in registrations_on(spec)] + old
    for name in references(published):
        here: Any = published
        if name.startswith("./"):
            assert (schema.ASYNCAPI_FILE.parent / name).exists()
        for part in name.removeprefix("#/").split("/") if name.startswith("#/") else ():
            here = here[part]


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [node["$ref"]] if "$ref" in node else [r for v in node.values() for r in references(v)]
    return [r for v in node for r in references(v)] if isinstance(node, list) else []


@pytest.mark.parametrize("event_type", list(REGISTRY))
def test_encoded_events_conform_to_the_schemas(event_type: str) -> None:
    @given(values_of(REGISTRY[event_type].model))
    @settings(max_examples=20, deadline=None)
    def conforms(event: Any) -> None:
        record, tally = encode(wrap_event(event)), schema_conformance.Tally()
        headers = {name: text.decode() for name, text in record.headers}
        schemas().count(tally, "here", headers, record.value)
        tally.raise_if_broken()

    conforms()


@cache
def schemas() -> schema_conformance.PublishedSchemas:
    return schema_conformance.PublishedSchemas()


OTHERS: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 0.5, -0.5, 1023, 1024, 2**31 - 1, 2**31, 2**63 - 1, 2**63, "", "x", "noop", "a\0b",
    "x" * 64, "ab" * 32, "y" * 256, "z" * 2001, [], ["linear"], {}, {"a": 1}, {"a": None}, {"a\0": 1}, {"a": "b\0"},
    "wait", "cull", "germinate", "propose", "retire", "dormant", "evaluating", "completed", "YWJj", "YWJ",
)  # fmt: skip


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=500, deadline=None)
def test_schema_accepts_exactly_the_decodable_values(event: Any, data: st.DataObject) -> None:
    record = encode(wrap_event(event))
    value = json.loads(record.value or b"")
    change_member(value, data)
    is_valid = validator(event.type).is_valid(value)
    read = decode_or_error(record.topic, json.dumps(value).encode(), record.headers)
    if isinstance(read, DecodeError):
        assert not is_valid or any(rule in read.detail for rule in BEYOND_SCHEMAS), read
    else:
        assert is_valid, list(validator(event.type).iter_errors(value))


def test_schema_and_model_refuse_a_verdict_without_runs() -> None:
    (event, *_more) = [e for e in EXAMPLES if e.type == "esper.policy.evaluated.v1" and e.verdict == "better"]
    record = encode(wrap_event(event))
    value = json.loads(record.value or b"")
    assert validator(event.type).is_valid(value)
    for runs in ({"held_out_runs": []}, {}):
        incomplete = {k: v for k, v in value.items() if k != "held_out_runs"} | runs
        assert not validator(event.type).is_valid(incomplete)
        assert isinstance(decode_or_error(record.topic, json.dumps(incomplete).encode(), record.headers), DecodeError)


def change_member(value: Any, data: st.DataObject) -> None:
    """Replace, drop or add one member of a value, at any depth."""
    holders = list(inner(value))
    holder = data.draw(st.sampled_from(holders))
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = data.draw(st.sampled_from(keys))
    what = data.draw(st.sampled_from(["replace", "drop", "add"]))
    if what == "drop":
        del holder[key]
    elif what == "add" and isinstance(holder, dict):
        holder["surprise"] = 1
    else:
        holder[key] = copy.deepcopy(data.draw(st.sampled_from(OTHERS)))


def inner(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict | list) and value else []) + [v for c in children for v in inner(c)]


def lines(*event_types: str) -> str:
    wanted = (
        {k: v for k, v in golden_records.read(golden_records.FOLDER / f"{t}.json").items() if k != "expected"}
        for t in event_types
    )
    return "".join(json.dumps(record) + "\n" for record in wanted)


def test_validate_accepts_saved_records() -> None:
    ran = CliRunner().invoke(app, ["schema", "validate", "-"], input=lines(*BY_TYPE))
    assert ran.exit_code == 0
    assert "esper.run.ended.v1" in ran.output


@pytest.mark.parametrize(
    ("old", "new", "expected_text"),
    [
        ('\\"step\\":40', '\\"step\\":-4', "value.step: -4 is less than the minimum of 0"),
        ("esper.run.ended.v1", "esper.run.gone.v1", "no schema is published"),
        ('\\"step\\":40', '\\"step\\":NaN', "NaN is not JSON"),
        ('"ce_specversion": "1.0"', '"ce_specversion": "2.0"', "headers.ce_specversion"),
    ],
)
def test_validate_reports_records_that_do_not_conform(old: str, new: str, expected_text: str) -> None:
    ran = CliRunner().invoke(app, ["schema", "validate", "-"], input=lines("esper.run.ended.v1").replace(old, new))
    assert isinstance(ran.exception, ContractError)
    assert expected_text in str(ran.exception)


@pytest.mark.parametrize("arguments", [[], ["-", "--log"], ["--topic", "no.such"]])
def test_validate_refuses_missing_or_conflicting_sources(arguments: list[str]) -> None:
    assert isinstance(CliRunner().invoke(app, ["schema", "validate", *arguments], input="").exception, ConfigError)


def test_validate_refuses_lines_that_are_no_records() -> None:
    assert isinstance(CliRunner().invoke(app, ["schema", "validate", "-"], input="{}\n").exception, ConfigError)
