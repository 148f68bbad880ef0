"""The `urza` section of the settings."""

from pydantic import Field

from esper.config import SectionModel
from esper.metrics.settings import MetricsAddress


class UrzaSettings(SectionModel):
    """How the library of blueprints and kernels is served."""

    host: str = Field("127.0.0.1", description="The address that the API listens on.")
    port: int = Field(0, ge=0, le=65535, description="Its port; 0 takes a free one, which the log names.")
    kernel_seed: int = Field(0, description="Makes the weights of new kernels reproducible.")
    poll_s: float = Field(0.2, gt=0, description="Pause between two looks at the projection, in seconds.")
    change_timeout_s: float = Field(
        5.0, gt=0, description="How long a change waits for its projection before the API answers 202, in seconds."
    )
    metrics_host: str = Field("127.0.0.1", description="The address that metrics and readiness are served on.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Where Prometheus reads; 0 takes a free port, which the log names."
    )

    @property
    def metrics_address(self) -> MetricsAddress:
        """Where Urza answers Prometheus."""
        return MetricsAddress(self.metrics_host, self.metrics_port, "ESPER_URZA__METRICS_PORT")
