"""Where a process serves its metrics and health checks."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from esper.config import SectionModel

HOST_DESCRIPTION = (
    "Address on which metrics and health checks are served. They need no password, so serve them on a trusted "
    "network only."
)
PORT_DESCRIPTION = "Port of metrics and health checks; 0 takes a free port, which the log names."


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """Host and port to listen on; port 0 takes a free one.

    ``setting`` is the environment variable that changes the port. Error messages name it.
    """

    host: str
    port: int
    setting: str


class MetricsEndpointSettings(SectionModel):
    """Base of the settings of a service that serves metrics."""

    metrics_port_variable: ClassVar[str]
    """The environment variable that sets ``metrics_port``."""

    metrics_host: str = Field("127.0.0.1", description=HOST_DESCRIPTION)
    metrics_port: int = Field(0, ge=0, le=65535, description=PORT_DESCRIPTION)

    @property
    def metrics_address(self) -> MetricsAddress:
        """Where the service serves its metrics."""
        return MetricsAddress(self.metrics_host, self.metrics_port, self.metrics_port_variable)
