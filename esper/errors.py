"""The errors of Esper, by what the caller can do about them.

EsperError
├── ConfigError               fix the setting that the message names
├── ContractError             the data breaks a contract; a retry does not help
│   ├── DecodeError           a record cannot be decoded; it goes to the dead letters
│   ├── NewerVersionError     a record is newer than this program: upgrade the program
│   ├── MissingBlobError      the bucket has no such blob
│   └── KernelError           a kernel is corrupt, too large or does not fit
│       └── AlteredBlobError  the bytes of a blob do not match its SHA-256
├── NotSupportedError         the operation is not possible for a model with seeds
├── ConflictError             another process was first: read the state again, then decide
├── UnavailableError          a service does not answer: retry later
├── NotAllowedError           a service refuses the client: fix credentials or rights
├── OutboxFullError           the disk is full: free space
└── InvariantError            a bug in Esper: stop, and report it
    └── PositionError         the log and the projections do not match
"""

MAX_DETAIL_CHARS = 500
"""The most characters of an undecodable record that a message shows; messages go to logs, headers and tables."""


class EsperError(Exception):
    """Base of all errors that Esper raises deliberately. The message names the thing, the cause and the remedy."""


class ConfigError(EsperError):
    """A setting is missing, unknown or invalid."""


class ContractError(EsperError):
    """The data breaks a contract."""


class DecodeError(ContractError):
    """A record cannot be decoded.

    Args:
        reason: a short, stable word for the dead letter, such as ``bad_json``.
        detail: may quote the record; it is reduced to one printable line of at most ``MAX_DETAIL_CHARS``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        if len(detail) > MAX_DETAIL_CHARS:
            detail = detail[: MAX_DETAIL_CHARS - 3] + "..."
        detail = "".join(c if c.isprintable() else " " for c in detail)
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class NewerVersionError(ContractError):
    """A record has a newer version of a known event type. Upgrade consumers before producers."""


class KernelError(ContractError):
    """A kernel is corrupt, too large or does not fit its layer."""


class MissingBlobError(ContractError):
    """The object store answers, and the bucket has no such blob."""


class AlteredBlobError(KernelError):
    """The bytes of a blob do not match its SHA-256, in two reads: it was changed or damaged."""


class NotSupportedError(EsperError):
    """The operation is not possible for a model with seeds. The message names an alternative."""


class ConflictError(EsperError):
    """Another process changed the state first."""


class UnavailableError(EsperError):
    """A service does not answer. A later retry may help."""


class NotAllowedError(EsperError):
    """A service answers and refuses the client. A retry helps once credentials or rights are fixed."""


class OutboxFullError(EsperError):
    """The outbox cannot be written, usually because the disk is full. Nothing grows until it can."""


class InvariantError(EsperError):
    """An invariant of Esper does not hold."""


class PositionError(InvariantError):
    """The log and the projections do not match: a wiped broker, a lost range or a gap."""
