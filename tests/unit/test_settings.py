"""Settings: every source in its place, every wrong key told by name, no secret told at all."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.config import load_settings
from esper.errors import ConfigError
from esper.logging import MASK, redact
from esper.services.tamiyo.settings import TamiyoSettings
from esper.services.tolaria.settings import TrainerSettings
from esper.services.urza.settings import UrzaSettings
from esper.streams.settings import StreamsSettings

CONFIGS = Path(__file__).parent.parent.parent / "configs"
OWNERS = {"trainer": TrainerSettings, "tamiyo": TamiyoSettings, "urza": UrzaSettings, "streams": StreamsSettings}


def nowhere(tmp_path: Path) -> dict[str, str]:
    return {"ESPER_STATE_DIR": str(tmp_path)}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_that_ships_is_valid(path: Path, tmp_path: Path) -> None:
    settings = load_settings(path, nowhere(tmp_path))
    for name, model in OWNERS.items():
        settings.section(name, model)


def test_variables_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("kafka:\n  bootstrap_servers: a:1\ntrainer:\n  epochs: 3\n  link:\n    boundary_steps: 9\n")
    variables = {
        "ESPER_KAFKA__BOOTSTRAP_SERVERS": "b:2",
        "ESPER_TRAINER__LINK__BOUNDARY_STEPS": "4",
        **nowhere(tmp_path),
    }
    settings = load_settings(file, variables)
    assert settings.need_kafka().bootstrap_servers == "b:2"
    trainer = settings.section("trainer", TrainerSettings)
    assert (trainer.epochs, trainer.link.boundary_steps) == (3, 4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kafka:\n  bootstrap_server: x\n", "c.yaml:2: unknown setting 'kafka.bootstrap_server'; did you mean"),
        ("kafak:\n  x: 1\n", "c.yaml:1: unknown section 'kafak'; did you mean 'kafka'?"),
        ("logging:\n  level: LOUD\n", "c.yaml:2: setting 'logging.level'"),
        ("[1, 2]\n", "the top level must be a mapping"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_wrong_key_is_told_with_its_place(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file, nowhere(tmp_path))
    assert told in str(caught.value)


def test_a_wrong_key_of_a_service_is_told_by_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("trainer:\n  epochs: 2\n  link:\n    boundry_steps: 3\n")
    with pytest.raises(
        ConfigError, match=r"c.yaml:4: unknown setting 'trainer.link.boundry_steps'; did you mean 'boundary_steps'"
    ):
        load_settings(file, nowhere(tmp_path)).section("trainer", TrainerSettings)


def test_what_is_not_named_is_asked_for_when_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Kafka is named: start the embedded stack with `esper up`"):
        load_settings(None, nowhere(tmp_path)).need_kafka()


SECRET = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=8)
NAMES = st.sampled_from(["password", "secret_key", "API-KEY", "token", "authorization", "aws_secret_access_key"])


@given(secret=SECRET, name=NAMES, nesting=st.lists(st.sampled_from(["dict", "list", "tuple"]), max_size=5))
def test_a_secret_is_masked_at_any_depth(secret: str, name: str, nesting: list[str]) -> None:
    value: object = {name: secret, "dsn": f"postgresql://user:{secret}@host/db"}
    for kind in nesting:
        value = {"in": value} if kind == "dict" else [value] if kind == "list" else (value,)
    shown = repr(redact(value))
    assert MASK in shown
    assert f"'{secret}'" not in shown
    assert f":{secret}@" not in shown


def test_secrets_do_not_show_in_settings(tmp_path: Path) -> None:
    variables = {"ESPER_POSTGRES__DSN": "postgresql://u:hunter22@h/d", **nowhere(tmp_path)}
    settings = load_settings(None, variables)
    assert "hunter22" not in repr(settings)
    assert "hunter22" not in str(settings.model_dump())
    assert logging.getLogger("esper").level == logging.NOTSET
