"""Translates errors of aiokafka and ssl into Esper's, once for every client of Kafka.

Pure: connects to nothing. Invariant: no message contains a password; each is one line with the cause and the remedy.
"""

import asyncio
import ssl
from collections.abc import Iterator

from aiokafka import errors as kafka_errors
from aiokafka.errors import KafkaError

from esper.config import KafkaSettings
from esper.errors import ContractError, EsperError, NotAllowedError, UnavailableError

SECURITY = "ESPER_KAFKA__SECURITY__"
TLS_ALERT = b"\x15\x03"  # the first bytes of a TLS alert
CERTIFICATE_EXPIRED = 10  # OpenSSL's X509_V_ERR_ codes
WRONG_NAME = (62, 64)  # host name, address
CLIENT_ERRORS = (KafkaError, OSError)
"""What aiokafka raises where a request fails; a TimeoutError is an OSError."""

TRANSIENT_ERRORS = (UnavailableError, NotAllowedError)
"""What ``kafka_error`` returns where waiting can help: a broker returns, or a right is granted."""

MAX_NAMED = 3  # topics in one message
RIGHTS_REMEDY = "run `esper acls apply` as the broker's administrator, or check " + SECURITY + "USERNAME"


def kafka_error(error: BaseException, kafka: KafkaSettings) -> EsperError:
    """The Esper error for one of aiokafka's, to be raised ``from`` it.

    ``NotAllowedError`` where credentials, TLS or rights must be fixed, ``ContractError`` for a record that is too
    large, else ``UnavailableError``. An Esper error in the chain of causes is returned unchanged.
    """
    for cause in _chain(error):
        if isinstance(cause, EsperError):
            return cause
        refusal = _refusal(cause, kafka)
        if refusal is not None:
            return NotAllowedError(refusal)
    if isinstance(error, kafka_errors.MessageSizeTooLargeError | kafka_errors.RecordListTooLargeError):
        return ContractError(f"the broker refused a record as too large: {error}; see max.message.bytes of its topic")
    if isinstance(error, kafka_errors.KafkaConnectionError | OSError):  # TimeoutError is one
        return no_broker_error(kafka)
    return UnavailableError(f"Kafka at {kafka.bootstrap_servers}: the request failed with {error!r}; retry it")


def no_broker_error(kafka: KafkaSettings) -> UnavailableError:
    """No broker answers."""
    return UnavailableError(
        f"no Kafka broker answers at {kafka.bootstrap_servers}: is it running (`esper status`), and is "
        "ESPER_KAFKA__BOOTSTRAP_SERVERS right?"
    )


def no_tls_error(kafka: KafkaSettings) -> NotAllowedError:
    """The client uses TLS, the broker does not."""
    plain = "SASL_PLAINTEXT" if kafka.security.uses_sasl else "PLAINTEXT"
    return NotAllowedError(
        f"Kafka at {kafka.bootstrap_servers} does not speak TLS, but {SECURITY}PROTOCOL is "
        f"{kafka.security.protocol}: use the address of its TLS listener, or set {plain} if you trust the network"
    )


def no_credentials_error(kafka: KafkaSettings, mechanisms: list[str]) -> NotAllowedError:
    """The broker requires a user, and the client has none.

    Args:
        mechanisms: the SASL mechanisms that the broker accepts.
    """
    return NotAllowedError(
        f"Kafka at {kafka.bootstrap_servers} requires a user ({', '.join(mechanisms)}), but {SECURITY}PROTOCOL is "
        f"{kafka.security.protocol}: set SASL_{'SSL' if kafka.security.uses_tls else 'PLAINTEXT'}, "
        f"{SECURITY}USERNAME and {SECURITY}PASSWORD"
    )


def hidden_topics_error(topics: list[str], kafka: KafkaSettings) -> NotAllowedError:
    """Topics that the broker does not show to this user; whether they exist is unknown."""
    named = topics[:MAX_NAMED] + ([f"{len(topics) - MAX_NAMED} more"] if len(topics) > MAX_NAMED else [])
    return NotAllowedError(
        f"{principal(kafka)} has no right to see {', '.join(named)} on Kafka at {kafka.bootstrap_servers}: "
        f"{RIGHTS_REMEDY}"
    )


def principal(kafka: KafkaSettings) -> str:
    """The principal of this client, as the broker's ACLs name it."""
    security = kafka.security
    if security.uses_sasl:
        return f"User:{security.username}"
    return "the client's certificate" if security.cert_file is not None else "User:ANONYMOUS"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refusal(cause: BaseException, kafka: KafkaSettings) -> str | None:
    """Why the broker refuses this client, until settings or rights change; None for any other error."""
    at, security = f"Kafka at {kafka.bootstrap_servers}", kafka.security
    match cause:
        case kafka_errors.SaslAuthenticationFailed() | kafka_errors.AuthenticationFailedError():
            return (
                f"{at} refuses user {security.username!r} ({security.mechanism}): the user is unknown or the "
                f"password is wrong; check {SECURITY}USERNAME and {SECURITY}PASSWORD"
            )
        case kafka_errors.UnsupportedSaslMechanismError():
            return f"{at} has not enabled {security.mechanism}: set {SECURITY}MECHANISM to one that it has"
        case kafka_errors.IllegalSaslStateError():
            plain = "SSL" if security.uses_tls else "PLAINTEXT"
            return f"{at} requires no user: set {SECURITY}PROTOCOL to {plain}, or use a listener that requires one"
        case ssl.SSLCertVerificationError():
            return _bad_certificate(cause, kafka)
        case ssl.SSLError() if "CERTIFICATE_REQUIRED" in str(cause.reason):
            return f"{at} requires a client certificate: set {SECURITY}CERT_FILE and {SECURITY}KEY_FILE"
        case ssl.SSLError() if "ALERT" in str(cause.reason):
            return f"{at} refuses the TLS connection ({cause.reason}): check {SECURITY}CERT_FILE and KEY_FILE"
        case asyncio.IncompleteReadError() if not security.uses_tls and _is_tls_alert(cause):
            secure = "SASL_SSL" if security.uses_sasl else "SSL or SASL_SSL"
            return f"{at} uses TLS, but {SECURITY}PROTOCOL is {security.protocol}: set {secure}"
    return _missing_right(cause, kafka)


def _missing_right(cause: BaseException, kafka: KafkaSettings) -> str | None:
    names = {
        kafka_errors.TopicAuthorizationFailedError: "topic",
        kafka_errors.GroupAuthorizationFailedError: "consumer group",
        kafka_errors.TransactionalIdAuthorizationFailed: "transactional id",
        kafka_errors.ClusterAuthorizationFailedError: "the cluster",
    }
    kind = names.get(type(cause))
    if kind is None:
        return None
    resource = kind if kind == "the cluster" else f"{kind} {_resources(cause)}"
    return f"{principal(kafka)} lacks a right on {resource} of Kafka at {kafka.bootstrap_servers}: {RIGHTS_REMEDY}"


def _resources(cause: BaseException) -> str:
    """The resources in an authorization error: aiokafka passes one name, a set of names, or nothing."""
    names = cause.args[0] if cause.args else ()
    return ", ".join([names] if isinstance(names, str) else sorted(names)) or "(not named by the broker)"


def _bad_certificate(cause: ssl.SSLCertVerificationError, kafka: KafkaSettings) -> str:
    at = f"the certificate of Kafka at {kafka.bootstrap_servers}"
    if cause.verify_code == CERTIFICATE_EXPIRED:
        return f"{at} has expired: renew it on the broker"
    if cause.verify_code in WRONG_NAME:
        return f"{at} is for another host ({cause.verify_message}): use the name that it was issued for"
    ca_file = kafka.security.ca_file
    trusted = f"the authority in {ca_file}" if ca_file else "an authority that this system trusts"
    return f"{at} is not signed by {trusted} ({cause.verify_message}): check {SECURITY}CA_FILE"


def _is_tls_alert(cause: asyncio.IncompleteReadError) -> bool:
    """Whether aiokafka read the first bytes of a TLS alert as the length of a response."""
    return cause.expected is not None and cause.expected.to_bytes(4, "big", signed=True).startswith(TLS_ALERT)
