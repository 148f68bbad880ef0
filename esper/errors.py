"""The errors of Esper, split by what the caller can do about them.

EsperError
├── ConfigError            fix the named setting
├── ContractError          the data breaks a contract; resending it will not help
│   ├── DecodeError        a record that cannot be decoded: it goes to the dead letters
│   ├── NewerVersionError  a newer contract than this program reads: upgrade it
│   ├── MissingBlobError   the object store has no such blob
│   └── KernelError        a kernel that is corrupt, too large or does not fit
│       └── AlteredBlobError  a blob whose bytes are not those of its name
├── NotSupportedError      what was asked cannot be done with seeds in the model
├── ConflictError          somebody else was first: read again, then decide
├── UnavailableError       a service is away: retry later
├── NotAllowedError        a service refuses who asks: fix the credentials or the rights
├── OutboxFullError        no room on disk: free some
└── InvariantError         Esper's own promise is broken: stop, and report it
    └── PositionError      the log and the projections do not fit together
"""

MAX_DETAIL_CHARS = 500
"""How much of a broken record a reason may show: it ends up in logs, headers and tables."""


class EsperError(Exception):
    """Base of all errors that Esper raises on purpose. The message says what to do."""


class ConfigError(EsperError):
    """A setting is missing, unknown or wrong."""


class ContractError(EsperError):
    """The data breaks a contract."""


class DecodeError(ContractError):
    """A record that cannot be decoded. ``reason`` is a short, stable word for the dead letter.

    ``detail`` is made one printable line of at most ``MAX_DETAIL_CHARS``: it quotes what somebody else wrote.
    """

    def __init__(self, reason: str, detail: str) -> None:
        if len(detail) > MAX_DETAIL_CHARS:
            detail = detail[: MAX_DETAIL_CHARS - 3] + "..."
        detail = "".join(c if c.isprintable() else " " for c in detail)
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class NewerVersionError(ContractError):
    """A newer version of a known event type. Consumers upgrade before producers."""


class KernelError(ContractError):
    """A kernel that is corrupt, too large or does not fit its layer."""


class MissingBlobError(ContractError):
    """The object store answers, and has no such blob."""


class AlteredBlobError(KernelError):
    """A blob whose bytes are not those of its name, read twice: somebody changed or damaged it."""


class NotSupportedError(EsperError):
    """What was asked cannot be done with seeds in the model; the message says what can."""


class ConflictError(EsperError):
    """Somebody else was first."""


class UnavailableError(EsperError):
    """A service did not answer. Trying again later may help."""


class NotAllowedError(EsperError):
    """A service answers, and refuses who asks. Trying again helps once credentials or rights are mended."""


class OutboxFullError(EsperError):
    """The outbox cannot be written, as a rule because its disk is full. Growth is refused until it can."""


class InvariantError(EsperError):
    """A promise that Esper makes to itself is broken."""


class PositionError(InvariantError):
    """The log and the projections do not fit together (a wiped broker, a lost range, a gap)."""
