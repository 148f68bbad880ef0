"""The embedded broker with all security: SASL_SSL, SCRAM-SHA-512 and ACLs that deny by default.

It has three listeners: ``SASL_SSL`` for services, ``INTERNAL`` (client certificates) for the broker itself and its
administrator, and ``CONTROLLER``. No command line and no properties file holds a password: the administrator creates
users through the admin API with a certificate.
"""

import asyncio
import secrets
import ssl
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization
from pydantic import SecretStr

from esper.config import KafkaSettings
from esper.embedded.kafka import EmbeddedKafka
from esper.embedded.processes import free_port
from esper.oona.admin.scram_users import set_passwords

BROKER, ADMINISTRATOR = "broker", "administrator"

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=SASL_SSL://127.0.0.1:{port},INTERNAL://127.0.0.1:{internal_port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=SASL_SSL://127.0.0.1:{port},INTERNAL://127.0.0.1:{internal_port}
listener.security.protocol.map=SASL_SSL:SASL_SSL,INTERNAL:SSL,CONTROLLER:SSL
inter.broker.listener.name=INTERNAL
controller.listener.names=CONTROLLER
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location={keystore}
ssl.truststore.type=PEM
ssl.truststore.location={ca}
listener.name.internal.ssl.client.auth=required
listener.name.controller.ssl.client.auth=required
ssl.principal.mapping.rules=RULE:^.*CN=([a-z]+).*$/$1/
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users={super_users}
allow.everyone.if.no.acl.found=false
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


class SecureKafka:
    """The broker, its certificate authority and its users.

    Args:
        root: folder of the broker.
        super_users: users with all rights, in addition to the administrator.
    """

    def __init__(self, root: Path, super_users: Sequence[str] = ()) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.passwords: dict[str, str] = {}
        self.ca_file = root / "ca.pem"
        self._authority = trustme.CA()
        self._authority.cert_pem.write_to_path(self.ca_file)
        self._internal_port = free_port()
        port = free_port()
        properties = _PROPERTIES.format(
            port=port,
            internal_port=self._internal_port,
            controller_port=free_port(),
            keystore=self.certificate(BROKER),
            ca=self.ca_file,
            data=root / "kafka" / "data",
            super_users=";".join(f"User:{name}" for name in (BROKER, ADMINISTRATOR, *super_users)),
        )
        self.broker = EmbeddedKafka(root / "kafka", properties=properties, port=port)

    def certificate(self, name: str) -> Path:
        """Write a PEM file with a new key and a certificate for 127.0.0.1 whose CN is ``name``."""
        issued = self._authority.issue_cert("127.0.0.1", common_name=name)
        key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
        pkcs8 = key.private_bytes(  # the only format that Kafka reads
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self.root / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_bytes(pkcs8 + b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return path

    @property
    def administrator(self) -> KafkaSettings:
        """Settings of the administrator: a certificate on the internal listener."""
        certificate = self.root / f"{ADMINISTRATOR}.pem"
        security = {
            "protocol": "SSL",
            "ca_file": self.ca_file,
            "cert_file": certificate if certificate.exists() else self.certificate(ADMINISTRATOR),
            "key_file": certificate,
        }
        return KafkaSettings.model_validate(
            {"bootstrap_servers": f"127.0.0.1:{self._internal_port}", "security": security}
        )

    def add_users(self, *names: str) -> None:
        """Create users with random passwords, or change their passwords."""
        for name in names:
            self.passwords[name] = secrets.token_urlsafe(24)
        passwords = {name: SecretStr(self.passwords[name]) for name in names}
        with ThreadPoolExecutor(1) as pool:  # this thread may have a running event loop
            pool.submit(asyncio.run, set_passwords(self.administrator, passwords)).result()

    def section(self, user: str, **changed: object) -> dict[str, object]:
        """The ``kafka.security`` section of a user, with the password in plain text."""
        security = {
            "protocol": "SASL_SSL",
            "username": user,
            "password": self.passwords.get(user),
            "ca_file": self.ca_file,
        }
        return {**security, **changed}

    def settings(self, user: str, **changed: object) -> KafkaSettings:
        """Kafka settings of a user."""
        return KafkaSettings.model_validate(
            {"bootstrap_servers": self.broker.bootstrap_servers, "security": self.section(user, **changed)}
        )

    def environment(self, user: str, **changed: object) -> dict[str, str]:
        """Environment variables with which a process connects as a user."""
        named = {f"ESPER_KAFKA__SECURITY__{k}".upper(): str(v) for k, v in self.section(user, **changed).items()}
        return {"ESPER_KAFKA__BOOTSTRAP_SERVERS": self.broker.bootstrap_servers, **named}


@contextmanager
def secure_kafka(root: Path, super_users: Sequence[str] = ()) -> Iterator[SecureKafka]:
    """Run the broker. Only the administrator and super users have rights."""
    kafka = SecureKafka(root, super_users)
    kafka.broker.start()
    try:
        yield kafka
    finally:
        kafka.broker.stop()


def foreign_authority(folder: Path) -> Path:
    """Certificate file of an authority that the broker does not trust."""
    path = folder / "foreign-ca.pem"
    trustme.CA().cert_pem.write_to_path(path)
    assert ssl.create_default_context(cafile=path)
    return path
