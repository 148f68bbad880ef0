"""The `urza` section of the settings."""

from pydantic import Field

from esper.config import SectionModel
from esper.metrics.settings import MetricsAddress


class UrzaSettings(SectionModel):
    """How the library of blueprints and kernels is served."""

    host: str = Field("127.0.0.1", description="The address that the API listens on.")
    port: int = Field(0, ge=0, le=65535, description="Its port; 0 takes a free one, which the log names.")
    kernel_seed: int = Field(0, description="Makes the weights of new kernels reproducible.")
    certify_widths: tuple[int, ...] = Field(
        (16, 64),
        min_length=1,
        max_length=8,
        description="Widths (output features) in which a blueprint is examined before it is certified.",
    )
    sandbox_wall_s: float = Field(
        30.0,
        gt=0,
        description="How long one job of the sandbox may take: a blueprint, or a batch of kernels, in seconds.",
    )
    sandbox_cpu_s: int = Field(
        20, ge=1, description="How much processor time one job of the sandbox may use, in seconds."
    )
    sandbox_memory_mb: int = Field(
        2048,
        ge=256,
        description="How much memory one job of the sandbox may take, in MiB; the largest kernel needs 1 GiB.",
    )
    parallel_uploads: int = Field(10, ge=1, le=50, description="How many kernels go to S3 at a time.")
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
