"""`esper config` as a process, and secrets that other processes could see."""

import json
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT
from support.processes.esper_processes import SCRIPTS, command_lines

from esper.config.settings_reference import markdown
from esper.embedded.stack import EmbeddedStack, inherited_environment

SECRETS = {
    "ESPER_KAFKA__SECURITY__PASSWORD": "kafka hun'ter22",
    "ESPER_POSTGRES__DSN": "postgresql://u:pg%20hunter22@h/d",
    "ESPER_S3__ACCESS_KEY": "access-hunter22",
    "ESPER_S3__SECRET_KEY": "s3-hunter22",
}
ADDRESSES = {**SECRETS, "ESPER_KAFKA__BOOTSTRAP_SERVERS": "a:1,b:2"}


def config(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**inherited_environment(), "ESPER_STATE_DIR": str(folder / "state"), **variables}
    return subprocess.run(
        [SCRIPTS / "esper", "config", *arguments], env=environment, text=True, capture_output=True, check=False, timeout=60
    )  # fmt: skip


def test_config_show_prints_values_and_origins(tmp_path: Path) -> None:
    file = ROOT / "configs" / "production.yaml"
    shown = config(tmp_path, "show", "--config", str(file), **ADDRESSES)
    assert shown.returncode == 0, shown.stderr
    rows = {key: rest for key, *rest in map(str.split, shown.stdout.splitlines())}
    assert rows["kafka.bootstrap_servers"] == ["a:1,b:2", "ESPER_KAFKA__BOOTSTRAP_SERVERS"]
    assert rows["kafka.replication_factor"][0] == "3"
    assert rows["kafka.replication_factor"][1].startswith(f"{file}:")
    assert rows["tamiyo.rng_seed"] == ["0", "default"]
    assert rows["s3.secret_key"] == ["***", "ESPER_S3__SECRET_KEY"]
    as_json = config(tmp_path, "show", "--json", "s3", "--config", str(file), **ADDRESSES)
    assert {r["key"]: r["value"] for r in json.loads(as_json.stdout)}["s3.bucket"] == "esper"
    for run in (shown, as_json):
        assert "ter22" not in run.stdout + run.stderr


def test_config_check_reports_all_errors_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tamiyo:\n  epsilon: 7\ntrainer:\n  epoch: 3\n")
    refused = config(tmp_path, "check", str(file), ESPER_URZA__PORT="high")
    assert refused.returncode == 1
    assert f"{file}:2: setting 'tamiyo.epsilon' is 7" in refused.stderr
    assert f"{file}:4: unknown setting 'trainer.epoch'; did you mean 'epochs'?" in refused.stderr
    assert "ESPER_URZA__PORT (variable): setting 'urza.port' is 'high'" in refused.stderr
    assert "Traceback" not in refused.stderr
    right = config(tmp_path, "check", str(ROOT / "configs" / "phase1_mvp.yaml"))
    assert (right.returncode, right.stderr) == (0, "")


def test_config_docs_prints_the_page(tmp_path: Path) -> None:
    assert config(tmp_path, "docs").stdout == markdown()


@pytest.mark.parametrize("command", [["topics", "list"], ["migrate"], ["serve", "urza"]])
def test_failing_command_prints_no_secret(command: list[str], tmp_path: Path) -> None:
    environment = {**inherited_environment(), **SECRETS, "ESPER_STATE_DIR": str(tmp_path), "ESPER_S3__POOL_SIZE": "no"}
    run = subprocess.run(
        [SCRIPTS / "esper", *command], env=environment, text=True, capture_output=True, check=False, timeout=60
    )
    assert run.returncode == 1
    assert "ESPER_S3__POOL_SIZE (variable): setting 's3.pool_size' is 'no'" in run.stderr
    assert "ter22" not in run.stdout + run.stderr


def test_no_secret_is_on_a_command_line(stack: EmbeddedStack) -> None:
    sections = stack.sections()
    secrets = {sections["s3"]["access_key"], sections["s3"]["secret_key"], sections["postgres"]["dsn"]}
    lines = command_lines()
    assert "rclone" in lines
    assert not [s for s in secrets if s in lines]
