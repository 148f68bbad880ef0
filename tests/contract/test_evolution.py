"""Evolution of contracts: old records stay readable, and `schema check` finds breaking changes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field, create_model
from support.events import golden_records
from support.events.event_examples import BY_TYPE, wrap_event
from typer.testing import CliRunner

from esper.cli import schema
from esper.cli.app import app
from esper.errors import ContractError, DecodeError, NewerVersionError
from esper.oona.cloudevents import decode, encode
from esper.schemas import topics
from esper.schemas.events import Event
from esper.schemas.messages import OonaMessage
from esper.schemas.registry import REGISTRY, Registration, Registry
from esper.schemas.specs.asyncapi import document
from esper.schemas.specs.compatibility import Affected, check
from esper.schemas.specs.contract_set import ContractSet, contracts_of, read_released, with_released, write_released
from esper.schemas.upcasters import Upcaster, Value, next_version, upcast

V1, V2, V3 = (f"esper.note.written.v{n}" for n in (1, 2, 3))


@pytest.mark.parametrize("path", sorted(golden_records.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_golden_record_decodes_to_the_same_value(path: Path) -> None:
    found = golden_records.read(path)
    assert found["headers"]["ce_type"] == path.stem
    assert golden_records.decode_golden(found) == found["expected"]
    assert found["key"] == REGISTRY.find(path.stem).key_of(decoded_event(found))


@pytest.mark.parametrize("path", sorted(golden_records.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_golden_record_conforms_to_the_released_schema(path: Path) -> None:
    released = read_released().types.get(path.stem) or contracts_of().types[path.stem]
    jsonschema.Draft202012Validator(released.schema).validate(json.loads(golden_records.read(path)["value"]))


def decoded_event(found: dict[str, Any]) -> Event:
    headers = [(name, text.encode()) for name, text in found["headers"].items()]
    return decode(found["topic"], found["value"].encode(), headers).data


def test_golden_records_cover_every_type_and_version() -> None:
    existing = {p.stem for p in golden_records.FOLDER.glob("*.json")}
    assert set(REGISTRY) - existing == set(), "run `PYTHONPATH=tests python -m support.events.golden_records`"
    assert set(read_released().types) - existing == set(), "a golden record of a released type is kept forever"


def test_models_do_not_break_released_contracts() -> None:
    breaks = [f for f in check(read_released(), contracts_of(), REGISTRY.upcasters) if f.is_break]
    assert breaks == [], "`esper schema check` prints the remedies"


class NoteWritten(Event):
    type: Literal["esper.note.written.v3"] = "esper.note.written.v3"
    run_id: str
    words: tuple[str, ...]
    num_words: int


def _v1_to_v2(value: Value) -> Value:
    return {"run_id": value["run"], **{k: v for k, v in value.items() if k != "run"}}


def _v2_to_v3(value: Value) -> Value:
    words = value["text"].split()
    return {"type": value["type"], "run_id": value["run_id"], "words": words, "num_words": len(words)}


NOTES = Registry([Registration(V3, NoteWritten, topics.RUNS, "run_id")], {V1: _v1_to_v2, V2: _v2_to_v3})


def read_note(event_type: str, value: str) -> OonaMessage:
    record = encode(wrap_event(BY_TYPE["esper.run.ended.v1"]))
    headers = [(n, event_type.encode() if n == "ce_type" else t) for n, t in record.headers]
    return decode(record.topic, value.encode(), headers, registry=NOTES)


@pytest.mark.parametrize(
    "value",
    [
        {"type": V1, "run": "run-1", "text": "it grows"},
        {"type": V2, "run_id": "run-1", "text": "it grows"},
        {"type": V3, "run_id": "run-1", "words": ["it", "grows"], "num_words": 2},
    ],
    ids=lambda v: v["type"],
)
def test_decode_converts_old_versions_to_the_newest(value: Value) -> None:
    expected = NoteWritten(run_id="run-1", words=("it", "grows"), num_words=2)
    assert read_note(value["type"], json.dumps(value)).data == expected


@pytest.mark.parametrize(
    ("event_type", "value", "reason"),
    [
        (V1, '{"type": "V1", "text": "x"}', "invalid"),
        (V1, '{"type": "V1", "run": "r", "text": 5}', "invalid"),
        (V1, '{"type": "V1", "run": "r", "text": "x", "more": NaN}', "bad_json"),
        (V1, '{"type": "V2", "run_id": "r", "text": "x"}', "invalid"),
        (V2, "[]", "invalid"),
        (V2, '{"type": "V2", "run_id": 5, "text": "x"}', "invalid"),
        ("esper.note.written.v0", "{}", "unknown_type"),
    ],
)
def test_decode_refuses_invalid_old_records_with_a_reason(event_type: str, value: str, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        read_note(event_type, value.replace("V1", V1).replace("V2", V2))
    assert caught.value.reason == reason


def test_decode_raises_newer_version_error() -> None:
    with pytest.raises(NewerVersionError, match="newer than v3"):
        read_note("esper.note.written.v4", "{}")


def test_upcast_does_not_change_its_argument() -> None:
    value = {"type": V1, "run": "run-1", "text": "it grows"}
    assert upcast(V1, value, NOTES.upcasters)["type"] == V3
    assert value == {"type": V1, "run": "run-1", "text": "it grows"}


def test_asyncapi_document_has_old_versions() -> None:
    published = document("1", NOTES, [topics.RUNS])
    assert list(published["channels"]["system.runs"]["messages"]) == [V3, V1, V2]
    assert published["components"]["messages"][V1]["summary"] == f"Old version, read as {V3}."
    assert len(published["operations"]["receive:system.runs"]["messages"]) == 3
    assert published["operations"]["send:system.runs"]["messages"] == [
        {"$ref": f"#/channels/system.runs/messages/{V3}"}
    ]


def test_registry_refuses_an_upcaster_without_a_model() -> None:
    with pytest.raises(ValueError, match=f"leads to {V2}"):
        Registry(NOTES.values(), {V1: _v1_to_v2})
    with pytest.raises(ValueError, match="is not the name of an event type"):
        next_version("note")


class Part(BaseModel, extra="forbid"):
    size: int


FIELDS: dict[str, Any] = {
    "type": (Literal["esper.note.written.v1"], V1),
    "run_id": (str, ...),
    "level": (Annotated[int, Field(ge=1, le=9)], ...),
    "mode": (Literal["a", "b"], ...),
    "name": (Annotated[str, Field(pattern="^[a-z]+$", max_length=9)], ...),
    "note": (str | None, None),
    "parts": (tuple[Part, ...], ...),
    "marks": (dict[str, int], ...),
    "tag": (Annotated[str, Field(json_schema_extra={"not": {"const": "x"}})], ...),
}


def contracts(**changes: Any) -> ContractSet:
    """The contracts of one type with some fields changed; None removes a field."""
    fields = {name: kind for name, kind in {**FIELDS, **changes}.items() if kind is not None}
    return of_model(create_model("NoteWritten", __base__=Event, **fields))


def of_model(model: type[Event], event_type: str = V1, upcasters: dict[str, Upcaster] | None = None) -> ContractSet:
    registry = Registry([Registration(event_type, model, topics.RUNS, "run_id")], upcasters or {})
    return contracts_of(registry, [topics.RUNS, topics.TELEMETRY])


class PartWithMore(Part):
    weight: int


class FreePart(BaseModel, extra="allow"):
    size: int


LOG, OLD = Affected.LOG_READERS, Affected.OLD_CONSUMERS


@pytest.mark.parametrize(
    ("changes", "path", "expected_text", "affected"),
    [
        ({"level": None}, "level", "removed", {LOG, OLD}),
        ({"note": None}, "note", "removed", {LOG}),
        ({"extra": (int, 0)}, "extra", "added (optional)", {OLD}),
        ({"extra": (int, ...)}, "extra", "added (required)", {LOG, OLD}),
        ({"note": (str | None, ...)}, "note", "is required now", {LOG}),
        ({"level": (Annotated[int, Field(ge=1, le=9)], 5)}, "level", "may be left out now", {OLD}),
        ({"note": (str | None, "x")}, "note", "default None became 'x'", {LOG, OLD}),
        ({"note": (str, "x")}, "note", "null is no longer allowed", {LOG}),
        ({"run_id": (str | None, ...)}, "run_id", "null is allowed now", {OLD}),
        ({"level": (str, ...)}, "level", "integer is no longer allowed", {LOG}),
        ({"level": (Annotated[float, Field(ge=1, le=9)], ...)}, "level", "number is allowed now", {OLD}),
        ({"level": (Annotated[int, Field(ge=2, le=9)], ...)}, "level", "minimum 1 became 2", {LOG}),
        ({"level": (Annotated[int, Field(ge=0, le=9)], ...)}, "level", "minimum 1 became 0", {OLD}),
        ({"level": (Annotated[int, Field(ge=1, le=8)], ...)}, "level", "maximum 9 became 8", {LOG}),
        ({"level": (Annotated[int, Field(ge=1)], ...)}, "level", "maximum 9 became none", {OLD}),
        ({"run_id": (Annotated[str, Field(min_length=1)], ...)}, "run_id", "minLength none became 1", {LOG}),
        ({"mode": (Literal["a"], ...)}, "mode", "'b' is no longer allowed", {LOG}),
        ({"mode": (Literal["a", "b", "c"], ...)}, "mode", "'c' is allowed now", {OLD}),
        ({"mode": (str, ...)}, "mode", "any value is allowed now", {OLD}),
        ({"run_id": (Literal["x", "y"], ...)}, "run_id", "only 'x', 'y' are allowed now", {LOG}),
        ({"name": (Annotated[str, Field(pattern="^[a-f]+$", max_length=9)], ...)}, "name", "pattern", {LOG, OLD}),
        ({"name": (Annotated[str, Field(max_length=9)], ...)}, "name", "became None", {OLD}),
        ({"run_id": (Annotated[str, Field(pattern="^a")], ...)}, "run_id", "pattern None", {LOG}),
        ({"parts": (tuple[PartWithMore, ...], ...)}, "parts[].weight", "added (required)", {LOG, OLD}),
        ({"parts": (tuple[FreePart, ...], ...)}, "parts[]", "unknown fields are allowed now", {OLD}),
        ({"parts": (Annotated[tuple[Part, ...], Field(max_length=3)], ...)}, "parts", "maxItems", {LOG}),
        ({"marks": (dict[str, str], ...)}, "marks{}", "integer is no longer allowed", {LOG}),
        ({"marks": (dict[Literal["a"], int], ...)}, "marks{key}", "only 'a' are allowed now", {LOG}),
        ({"tag": (Annotated[str, Field(json_schema_extra={"not": {"const": "y"}})], ...)}, "tag", "'not'", {LOG, OLD}),
        (
            {"tag": (Annotated[str, Field(max_length=5, json_schema_extra={"not": {"const": "x"}})], ...)},
            "tag",
            "maxLength none became 5",
            {LOG},
        ),
    ],
)
def test_check_reports_a_changed_shape_and_whom_it_breaks(
    changes: dict[str, Any], path: str, expected_text: str, affected: set[Affected]
) -> None:
    findings = check(contracts(), contracts(**changes), {})
    found = [f for f in findings if f.path == path and expected_text in f.what]
    assert {f.affected for f in found} == affected, findings
    assert all(V2 in f.remedy and f.why and f.is_break for f in found)


def test_check_of_the_reverse_change_breaks_the_other_side() -> None:
    narrower = contracts(level=(Annotated[int, Field(ge=2, le=9)], ...), parts=(tuple[FreePart, ...], ...))
    assert {(f.path, f.affected) for f in check(narrower, contracts(), {})} == {("level", OLD), ("parts[]", LOG)}


@pytest.mark.parametrize(
    ("change", "subject", "expected_text", "affected"),
    [
        (lambda s: with_routing(s, topic="system.other"), V1, "system.runs became system.other", Affected.ALL_CLIENTS),
        (lambda s: with_routing(s, key_field="name"), V1, "run_id became name", Affected.ALL_CLIENTS),
        (lambda s: ContractSet({}, s.topics), V1, "the type was removed", Affected.LOG_READERS),
        (
            lambda s: with_topic(s, topics.RUNS.name, num_partitions=24),
            "system.runs",
            "12 became 24",
            Affected.ALL_CLIENTS,
        ),
        (
            lambda s: with_topic(s, topics.RUNS.name, retention_ms=5),
            "system.runs",
            "forever became 5 ms",
            Affected.REBUILDS,
        ),
        (
            lambda s: with_topic(s, topics.TELEMETRY.name, retention_ms=5),
            "telemetry.seed.health",
            "5 ms",
            Affected.REBUILDS,
        ),
        (
            lambda s: with_topic(s, topics.TELEMETRY.name, retention_ms=-1),
            "telemetry.seed.health",
            "forever",
            Affected.NONE,
        ),
        (lambda s: ContractSet(s.types, {}), "system.runs", "the topic was removed", Affected.ALL_CLIENTS),
    ],
)
def test_check_reports_changed_topics_keys_and_retention(
    change: Callable[[ContractSet], ContractSet], subject: str, expected_text: str, affected: Affected
) -> None:
    findings = check(contracts(), change(contracts()), {})
    assert [f.affected for f in findings if f.subject == subject and expected_text in f.what] == [affected]


def with_routing(contract_set: ContractSet, **routing: str) -> ContractSet:
    return dataclasses.replace(contract_set, types={V1: dataclasses.replace(contract_set.types[V1], **routing)})


def with_topic(contract_set: ContractSet, name: str, **limits: int) -> ContractSet:
    changed = dataclasses.replace(contract_set.topics[name], **limits)
    return dataclasses.replace(contract_set, topics={**contract_set.topics, name: changed})


def test_check_ignores_titles_and_descriptions() -> None:
    titled = create_model("Other", __base__=Event, __doc__="Another description.", **FIELDS)
    described = contracts(level=(Annotated[int, Field(ge=1, le=9, description="how much", title="L")], ...))
    assert check(contracts(), of_model(titled), {}) == check(contracts(), described, {}) == []


def test_check_reports_a_new_type_or_topic_as_no_break() -> None:
    empty = ContractSet({}, {})
    findings = check(empty, contracts(), {})
    assert {f.what for f in findings} == {"a new type", "a new topic"}
    assert not any(f.is_break for f in findings)


def test_check_requires_an_upcaster_for_a_new_version() -> None:
    fields = {**FIELDS, "type": (Literal["esper.note.written.v2"], V2), "level": (str, ...)}
    second = create_model("NoteWritten", __base__=Event, **fields)
    found = check(contracts(), of_model(second, V2), {})
    assert [(f.subject, f.what) for f in found if f.is_break] == [(V1, "the type was removed")]
    upcasters: dict[str, Upcaster] = {V1: lambda value: {**value, "level": str(value["level"])}}
    found = check(contracts(), of_model(second, V2, upcasters), upcasters)
    assert [(f.what, f.affected) for f in found] == [("a new version", Affected.NONE)]


def test_release_round_trips_and_keeps_old_versions(tmp_path: Path) -> None:
    assert read_released(tmp_path) == ContractSet({}, {})
    write_released(contracts(), tmp_path)
    assert read_released(tmp_path) == contracts()
    newer = with_released(of_model(NoteWritten, V3, {}), read_released(tmp_path))
    write_released(newer, tmp_path)
    assert set(read_released(tmp_path).types) == {V1, V3}


class TestCommand:
    @pytest.fixture(autouse=True)
    def _own_release(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(schema, "read_released", contracts)

    def test_check_prints_breaks_and_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(schema, "contracts_of", lambda: contracts(level=(str, ...)))
        ran = CliRunner().invoke(app, ["schema", "check"])
        assert isinstance(ran.exception, ContractError)
        assert f"BREAKS {V1} level: integer is no longer allowed" in ran.output
        assert f"affects: {Affected.LOG_READERS}" in ran.output

    def test_check_passes_without_breaks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(schema, "contracts_of", contracts)
        ran = CliRunner().invoke(app, ["schema", "check"])
        assert (ran.exit_code, ran.output) == (0, "no breaking changes\n")

    def test_release_refuses_a_break(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(schema, "contracts_of", lambda: contracts(level=None))
        monkeypatch.setattr(schema, "write_released", lambda _contracts: pytest.fail("it was released"))
        assert isinstance(CliRunner().invoke(app, ["schema", "release"]).exception, ContractError)
