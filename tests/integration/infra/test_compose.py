"""infra/kafka.yml without Docker: valid, same Kafka version, and an environment and commands that work."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import INFRA

from esper.config import KafkaSettings
from esper.embedded.jars import KAFKA_VERSION, java_home, kafka_jars
from esper.embedded.kafka import EmbeddedKafka
from esper.embedded.processes import free_port
from esper.oona.admin.topics import TopicState, list_topics
from esper.schemas.topics import all_topics

# replaces kafka-topics.sh, which the embedded jars lack: the same arguments with another client
KAFKA_TOPICS = """
import argparse
from confluent_kafka.admin import AdminClient, NewTopic
parser = argparse.ArgumentParser()
for name in ("--bootstrap-server", "--topic", "--partitions", "--replication-factor"):
    parser.add_argument(name, required=True)
parser.add_argument("--create", action="store_true", required=True)
parser.add_argument("--if-not-exists", action="store_true", required=True)
parser.add_argument("--config", action="append")
a = parser.parse_args()
config = dict(pair.split("=") for pair in a.config)
topic = NewTopic(a.topic, int(a.partitions), int(a.replication_factor), config=config)
admin = AdminClient({"bootstrap.servers": a.bootstrap_server})
for made in admin.create_topics([topic]).values():
    made.result(30)
"""
FILE = INFRA / "kafka.yml"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text()))


def test_kafka_file_passes_compose_specification() -> None:
    check = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run(
        [check, "--builtin-schema", "vendor.compose-spec", FILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kafka_version_matches_embedded_stack(compose: dict[str, Any]) -> None:
    images = {service["image"] for service in compose["services"].values()}
    assert images == {f"apache/kafka:{KAFKA_VERSION}"}


def test_topics_match_contracts(compose: dict[str, Any]) -> None:
    specs = [line.split(":") for line in compose["services"]["topics"]["environment"]["TOPICS"].split()]
    named = {(name + end, int(n), int(ms) if not end else -1) for name, n, ms in specs for end in ("", ".dlq")}
    assert named == {(t.name, t.num_partitions, t.retention_ms) for t in all_topics()}


@pytest.mark.timeout(240)
def test_environment_boots_broker_and_creates_topics(compose: dict[str, Any], tmp_path: Path) -> None:
    jars = os.pathsep.join(map(str, kafka_jars(lambda _line: None)))
    java = str(java_home() / "bin" / "java")
    ports = {"29092": str(free_port()), "29093": str(free_port()), "9092": str(free_port())}
    variables = dict(compose["services"]["kafka"]["environment"])
    for name, value in variables.items():
        here = value.replace("kafka:", "127.0.0.1:").replace("localhost:", "127.0.0.1:").replace("//:", "//127.0.0.1:")
        for port, free in ports.items():
            here = here.replace(f":{port}", f":{free}")
        variables[name] = here
    variables["KAFKA_LOG_DIRS"] = str(tmp_path / "kafka" / "data")
    folders = {name: tmp_path / name for name in ("defaults", "mounted", "final")}
    for folder in folders.values():
        folder.mkdir()
    (folders["defaults"] / "server.properties").write_text("")
    (folders["defaults"] / "log4j2.yaml").write_text("")
    (folders["defaults"] / "tools-log4j2.yaml").write_text("")
    wrapper = [java, "-cp", jars, "kafka.docker.KafkaDockerWrapper", "setup"]
    named = [
        "--default-configs-dir",
        folders["defaults"],
        "--mounted-configs-dir",
        folders["mounted"],
        "--final-configs-dir",
        folders["final"],
    ]
    done = subprocess.run(
        [*wrapper, *map(str, named)], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    properties = (folders["final"] / "server.properties").read_text()
    broker = EmbeddedKafka(tmp_path / "kafka", properties=properties, port=int(ports["9092"]))
    try:
        broker.start()
        scripts = tmp_path / "bin"
        scripts.mkdir()
        tool = scripts / "kafka-topics.sh"
        tool.write_text(f"#!{sys.executable}\n{KAFKA_TOPICS}")
        tool.chmod(0o755)
        service = compose["services"]["topics"]
        script = service["command"][0].replace("$$", "$").replace("/opt/kafka/bin", str(scripts))
        environment = {**os.environ, **service["environment"], "BOOTSTRAP": f"127.0.0.1:{ports['9092']}"}
        bash = shutil.which("bash")
        assert bash is not None
        made = subprocess.run([bash, "-euc", script], env=environment, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
        kafka = KafkaSettings(bootstrap_servers=broker.bootstrap_servers)
        assert {s.state for s in asyncio.run(list_topics(kafka))} == {TopicState.PRESENT}
    finally:
        broker.stop()
