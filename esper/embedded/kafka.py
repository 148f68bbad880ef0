"""A real, single-node Apache Kafka (KRaft) on free ports of 127.0.0.1."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from esper.embedded.embedded_server import EmbeddedServer
from esper.embedded.jars import java_home, kafka_jars
from esper.embedded.processes import ChildProcess, free_port
from esper.errors import UnavailableError

HEAP = "-Xmx512m"
JVM_OPTIONS = (HEAP, "-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true")

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
offsets.topic.num.partitions=8
group.initial.rebalance.delay.ms=0
log.segment.bytes=16777216
"""


class EmbeddedKafka(EmbeddedServer):
    """An embedded broker. It keeps its ports and its data between starts; ``wipe`` makes the next start a new cluster.

    Args:
        root: folder for this broker only.
        report: called with a progress line for slow steps.
        properties: content of server.properties that replaces the built-in one; ``port`` must be its port.
    """

    def __init__(
        self,
        root: Path,
        *,
        report: Callable[[str], None] = lambda _line: None,
        properties: str | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(root, "Kafka", port)
        self._report = report
        self._properties = properties

    @property
    def bootstrap_servers(self) -> str:
        """The address that clients connect to."""
        return f"127.0.0.1:{self.port}"

    def default_properties(self) -> str:
        """The built-in server.properties, with this broker's port and a free controller port."""
        return _PROPERTIES.format(port=self.port, controller_port=free_port(), data=self.root / "data")

    def pause(self) -> None:
        """Suspend it (SIGSTOP): it keeps its connections open and stops responding, until ``resume``."""
        if self._process is not None:
            self._process.send(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume it after ``pause``."""
        if self._process is not None:
            self._process.send(signal.SIGCONT)

    def _prepare(self) -> ChildProcess:
        class_path = os.pathsep.join(str(jar) for jar in kafka_jars(self._report))
        config = self.root / "server.properties"
        self._properties = self._properties or self.default_properties()
        config.write_text(self._properties, encoding="utf-8")  # always rewritten: existing data may have other ports
        if not (self.root / "data" / "meta.properties").exists():
            self._format(class_path, config)
        return self._child([*_java(class_path), "kafka.Kafka", str(config)], {"LANG": "C.UTF-8"})

    def _format(self, class_path: str, config: Path) -> None:
        tool = [*_java(class_path), "kafka.tools.StorageTool"]
        cluster = subprocess.run([*tool, "random-uuid"], capture_output=True, text=True, check=False)
        command = [*tool, "format", "-t", cluster.stdout.strip(), "-c", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"Kafka's storage in {self.root} cannot be formatted:\n{done.stdout}{done.stderr}")


def _java(class_path: str) -> list[str]:
    return [str(java_home() / "bin" / "java"), *JVM_OPTIONS, "-cp", class_path]
