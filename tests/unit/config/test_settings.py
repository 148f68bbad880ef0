"""Settings: precedence of the sources, errors that name key and line, and no secret in any output."""

import json
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from support.paths import ROOT

from esper.config import (
    SECTIONS,
    KafkaSecurity,
    PostgresSettings,
    S3Settings,
    SectionModel,
    Settings,
    get_service_config,
    load_settings,
    section_model,
)
from esper.config.settings_reference import DEFAULT, check_all, configured_sections, list_settings, markdown
from esper.config.sources import ENV_PREFIX
from esper.errors import ConfigError
from esper.logging import redact
from esper.services.tolaria.settings import TrainerSettings

CONFIGS = ROOT / "configs"
ADDRESSES = {
    "ESPER_KAFKA__BOOTSTRAP_SERVERS": "a:1,b:2,c:3",
    "ESPER_KAFKA__SECURITY__PASSWORD": "kafka-hunter22",
    "ESPER_POSTGRES__DSN": "postgresql://u:pg-hunter22@h/d",
    "ESPER_S3__ACCESS_KEY": "access-hunter22",
    "ESPER_S3__SECRET_KEY": "s3-hunter22",
}
SECRET = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=("C", "Z")), min_size=8)
SECRET = SECRET.map(lambda s: f"~{s}~")  # so that no message contains it by chance


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """Environment variables of a machine on which no embedded stack runs."""
    return {"ESPER_STATE_DIR": str(tmp_path / "state")}


def error_of(tmp_path: Path, text: str | bytes, **variables: str) -> str:
    """The error message about a settings file, without the name of its folder."""
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        check_all(load_settings(file, {"ESPER_STATE_DIR": str(tmp_path / "state"), **variables}))
    return str(caught.value).replace(f"{tmp_path}/", "")


# -- files that ship with Esper


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_config_is_valid(path: Path, nowhere: dict[str, str]) -> None:
    check_all(load_settings(path, {**nowhere, **ADDRESSES, "ESPER_KAFKA__SECURITY__USERNAME": "u"}))


@pytest.mark.parametrize("name", ["development", "phase1_mvp", "digits"])
def test_config_for_embedded_stack_needs_no_variables(name: str, nowhere: dict[str, str]) -> None:
    check_all(load_settings(CONFIGS / f"{name}.yaml", nowhere))


def test_production_config_reports_all_missing_keys_at_once(nowhere: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(CONFIGS / "production.yaml", nowhere)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(ADDRESSES)
    for variable in ADDRESSES:
        assert sum(variable in line for line in lines) == 1
    assert all(line.startswith(str(CONFIGS / "production.yaml")) for line in lines)


def test_production_config_is_replicated_and_encrypted(nowhere: dict[str, str]) -> None:
    settings = load_settings(CONFIGS / "production.yaml", {**nowhere, **ADDRESSES})
    kafka = settings.need_kafka()
    assert (kafka.replication_factor, kafka.min_insync_replicas) == (3, 2)
    assert kafka.security.uses_tls
    assert kafka.security.uses_sasl
    assert settings.logging.format == "json"
    secret = [row for row in list_settings(settings, SECTIONS) if row.value == "***"]
    assert {row.origin for row in secret} == set(ADDRESSES) - {"ESPER_KAFKA__BOOTSTRAP_SERVERS"}


def test_settings_page_matches_code() -> None:
    assert (ROOT / "docs" / "deployment" / "configuration.md").read_text() == markdown(), (
        "run `esper config docs > docs/deployment/configuration.md`"
    )


# -- sources


def test_sources_variable_beats_file_beats_stack(tmp_path: Path) -> None:
    file, state = tmp_path / "c.yaml", tmp_path / "state"
    state.mkdir()
    described = {"kafka": {"bootstrap_servers": "s:1"}, "postgres": {"dsn": "postgresql://s/d"}, "supervisor_pid": 1}
    (state / "stack.json").write_text(json.dumps(described))
    file.write_text("kafka:\n  bootstrap_servers: a:1\ntrainer:\n  epochs: 3\n  link:\n    boundary_steps: 9\n")
    variables = {"ESPER_STATE_DIR": str(state), "ESPER_TRAINER__LINK__BOUNDARY_STEPS": "4"}
    settings = load_settings(file, variables)
    assert settings.need_kafka().bootstrap_servers == "a:1"
    trainer = settings.section("trainer", TrainerSettings)
    assert (trainer.epochs, trainer.link.boundary_steps) == (3, 4)
    origins = {row.key: row.origin for row in list_settings(settings, configured_sections(settings))}
    assert origins["kafka.bootstrap_servers"] == f"{file}:2"
    assert origins["kafka.replication_factor"] == DEFAULT
    assert origins["postgres.dsn"] == "the running stack"
    assert origins["trainer.epochs"] == f"{file}:4"
    assert origins["trainer.link.boundary_steps"] == "ESPER_TRAINER__LINK__BOUNDARY_STEPS"


def test_get_service_config_returns_section_by_name(nowhere: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {**nowhere, **ADDRESSES, "ESPER_TAMIYO__EPSILON": "0.5"}.items():
        monkeypatch.setenv(variable, value)
    assert get_service_config("tamiyo").epsilon == 0.5
    assert get_service_config("kafka").bootstrap_servers == "a:1,b:2,c:3"
    for name in SECTIONS:
        assert type(get_service_config(name)) is section_model(name)
    with pytest.raises(ConfigError, match="unknown section 'tamyo'; did you mean 'tamiyo'"):
        get_service_config("tamyo")


def test_missing_address_is_reported_on_use(nowhere: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="no address of Kafka is set; start the embedded stack with `esper up`"):
        load_settings(None, nowhere).need_kafka()


def test_empty_file_and_empty_section_are_defaults(tmp_path: Path, nowhere: dict[str, str]) -> None:
    file = tmp_path / "c.yaml"
    for text in ("", "# nothing\n", "logging:\ntrainer:\n", "\ufefflogging: {}\n"):
        file.write_text(text, encoding="utf-8")
        check_all(load_settings(file, nowhere))


def test_kubernetes_variables_are_ignored(nowhere: dict[str, str]) -> None:
    kubernetes = {
        "ESPER_URZA_SERVICE_HOST": "10.0.0.1",
        "ESPER_URZA_SERVICE_PORT_HTTP": "80",
        "ESPER_URZA_PORT": "tcp://10.0.0.1:80",
        "ESPER_URZA_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    load_settings(None, {**nowhere, **kubernetes})


# -- errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kafka:\n  bootstrap_server: x\n", "c.yaml:2: unknown setting 'kafka.bootstrap_server'; did you mean"),
        ("kafak:\n  x: 1\n", "c.yaml:1: unknown section 'kafak'; did you mean 'kafka'?"),
        ("service_sections:\n  x: 1\n", "c.yaml:1: unknown section 'service_sections'"),
        ("logging:\n  level: LOUD\n", "c.yaml:2: setting 'logging.level' is 'LOUD'; input should be 'DEBUG', 'INFO'"),
        ("trainer:\n  link:\n    boundry_steps: 3\n", "c.yaml:3: unknown setting 'trainer.link.boundry_steps'; did"),
        ("tamiyo:\n  epsilon: 0\n", "c.yaml:2: setting 'tamiyo.epsilon' is 0; input should be greater than or equal"),
        ("logging: 5\n", "c.yaml:1: 'logging' is a section; write its keys below it: format, level"),
        ("trainer:\n  link: 5\n", "c.yaml:2: 'trainer.link' is a section; write its keys below it: boundary_steps"),
        ("postgres:\n  pool_size: 2\n", "c.yaml:1: setting 'postgres.dsn' is missing; set it there or by ESPER_POSTGRES__DSN"),
        ("logging:\n  level: INFO\n  level: DEBUG\n", "c.yaml:3: 'logging.level' is set twice, first in line 2"),
        ("logging: {}\ns3: {}\nlogging: {}\n", "c.yaml:3: 'logging' is set twice, first in line 1"),
        ("[1, 2]\n", "c.yaml:1: the top level must be a mapping of sections"),
        ("word\n", "c.yaml:1: the top level must be a mapping of sections"),
        ("a: [\n", "c.yaml:2: invalid YAML"),
        ("a: 1\n---\nb: 1\n", "c.yaml:2: invalid YAML: expected a single document"),
        ("logging:\n\tlevel: INFO\n", "c.yaml:2: invalid YAML: while scanning for the next token, found character that cannot start any token; indent with spaces, not tabs"),
        ("logging:\n  level: 2001-99-99\n", "c.yaml:2: setting 'logging.level' is not a valid value; quote it"),
        ("a: !!python/object:os.system x\n", "c.yaml:1: invalid YAML: could not determine a constructor"),
        ("? [1]\n: 2\n", "c.yaml:1: a key must be a plain word"),
        (b"a: 1\nb: \xff\n", "c.yaml:2: byte 8 is not UTF-8"),
        (b"a: \x01\n", "c.yaml: invalid YAML: control character at position 3"),
        ("[" * 100_000, "c.yaml:1: more than 30 nested levels"),
        ("a: &a [*a]\n", "c.yaml:1: the file's aliases expand to too many values"),
        ("a: &a [x,x,x,x]\n" + "".join(f"{y}: &{y} [*{x},*{x},*{x},*{x}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)), "the file's aliases expand to too many values"),
        ("x" * 1_000_001, "c.yaml is larger than 1,000,000 bytes, the limit of a settings file"),
    ],
)  # fmt: skip
def test_invalid_file_error_names_line(text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert expected in error_of(tmp_path, text)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ESPER_KAFAK": "x"}, "ESPER_KAFAK (variable): no setting has this name; did you mean ESPER_KAFKA__...?"),
        ({"ESPER_ZZZ": "x"}, "ESPER_ZZZ (variable): no setting has this name; the sections are kafka, logging"),
        ({"ESPER_URZA_PORT": "80"}, "ESPER_URZA_PORT (variable): no setting has this name; did you mean ESPER_URZA__"),
        ({"ESPER_KAFAK__X": "x"}, "ESPER_KAFAK__X (variable): unknown section 'kafak'; did you mean 'kafka'?"),
        ({"ESPER_LOGGING": "x"}, "ESPER_LOGGING (variable): 'logging' is a section; set one of its keys, for example ESPER_LOGGING__LEVEL"),
        ({"ESPER_TRAINER__LINK": "x"}, "ESPER_TRAINER__LINK (variable): 'trainer.link' is a section; set one of its keys, for example ESPER_TRAINER__LINK__"),
        ({"ESPER_LOGGING__LEVEL": "LOUD"}, "ESPER_LOGGING__LEVEL (variable): setting 'logging.level' is 'LOUD'; input should be"),
        ({"ESPER_TRAINER__EPOCHS": "no"}, "ESPER_TRAINER__EPOCHS (variable): setting 'trainer.epochs' is 'no'; input should be a valid integer"),
        ({"ESPER_TRAINER__LINK__FOLDR": "x"}, "ESPER_TRAINER__LINK__FOLDR (variable): unknown setting 'trainer.link.foldr'; did you mean 'folder'?"),
        ({"ESPER_LOGGING__LEVEL": "INFO", "ESPER_LOGGING__LEVEL__X": "1"}, "ESPER_LOGGING__LEVEL__X and ESPER_LOGGING__LEVEL cannot both be set"),
    ],
)  # fmt: skip
def test_invalid_variable_error_names_variable(variables: dict[str, str], expected: str, tmp_path: Path) -> None:
    assert expected in error_of(tmp_path, "", **variables)


def test_unreadable_file_is_reported(tmp_path: Path, nowhere: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_settings(tmp_path, nowhere)
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(None, {**nowhere, "ESPER_CONFIG": str(tmp_path / "none.yaml")})
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "stack.json").write_text("[")
    with pytest.raises(ConfigError, match="run `esper down`"):
        load_settings(None, nowhere)


@given(st.binary(max_size=60) | st.text(st.sampled_from("ab:{}[]&*!|>-?'\"#%@\t\n 1,<~"), max_size=60).map(str.encode))
def test_any_bytes_load_or_raise_config_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = folder / "any.yaml"
    file.write_bytes(data)
    try:
        load_settings(file, {"ESPER_STATE_DIR": str(folder / "state")})
        message = None
    except ConfigError as error:
        message = str(error)
    assert message is None or message.startswith(str(file))


# -- secrets


def secret_paths(model: type[SectionModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, field in model.model_fields.items():
        members = (field.annotation, *getattr(field.annotation, "__args__", ()))
        for member in members:
            if isinstance(member, type) and issubclass(member, SectionModel):
                found += secret_paths(member, (*path, name))
            elif member is SecretStr:
                found.append((*path, name))
    return found


SECRET_PATHS = [(name, *path) for name in SECTIONS for path in secret_paths(section_model(name))]


@given(secret=SECRET)
def test_settings_never_print_secrets(secret: str) -> None:
    variables = {ENV_PREFIX + "__".join(path).upper(): secret for path in SECRET_PATHS}
    variables |= {"ESPER_KAFKA__BOOTSTRAP_SERVERS": "a:1", "ESPER_STATE_DIR": "/nowhere"}
    settings = load_settings(None, variables)
    rows = list_settings(settings, configured_sections(settings))
    assert sum(row.value == "***" for row in rows) == len(SECRET_PATHS) == 5
    shown = [
        repr(settings),
        repr(settings.sourced),
        repr(redact(settings)),
        str(settings.model_dump()),
        settings.model_dump_json(),
        str(rows),
    ]
    for section in (settings.kafka, settings.postgres, settings.s3):
        assert section is not None
        shown += [repr(section), str(section), str(section.model_dump()), section.model_dump_json()]
    for text in shown:
        assert secret not in text
        assert json.dumps(secret)[1:-1] not in text


@given(secret=SECRET)
def test_config_error_never_contains_secrets(secret: str) -> None:
    wrong = {
        "ESPER_POSTGRES__DSN__X": secret,
        "ESPER_S3__SECRET_KEY": secret,
        "ESPER_S3__POOL_SIZE": f"s3://key:{secret.replace('/', '_')}@host",
        "ESPER_KAFKA__SECURITY__PASSWORD": secret,
        "ESPER_KAFKA__SECURITY__PROTOCOL": "SASL_SSL",
        "ESPER_STATE_DIR": "/nowhere",
    }
    with pytest.raises(ConfigError) as caught:
        load_settings(None, wrong)
    message = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert "postgres.dsn: input should be a valid string" in message
    assert "ESPER_KAFKA__SECURITY__USERNAME" in message
    assert secret not in message
    assert secret.replace("/", "_") not in message


@pytest.mark.parametrize("model", [PostgresSettings, S3Settings, KafkaSecurity])
def test_validation_error_never_contains_secrets(model: type[SectionModel]) -> None:
    values = {"dsn": ["hunter22"], "secret_key": ["hunter22"], "password": ["hunter22"], "protocol": "SASL_SSL"}
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    assert "hunter22" not in str(caught.value)


def test_raw_service_values_are_not_dumped() -> None:
    settings = Settings.model_validate({"service_sections": {"urza": {"token": "hunter22"}}})
    assert "hunter22" not in f"{settings!r}{settings.model_dump()}{settings.model_dump_json()}"
