"""The `urza` section of the settings."""

from pydantic import Field

from esper.config import SectionModel


class UrzaSettings(SectionModel):
    """``port`` 0 takes a free one, which the log names. ``kernel_seed`` makes kernels reproducible."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    kernel_seed: int = 0
    poll_s: float = Field(0.2, gt=0)
    change_timeout_s: float = Field(5.0, gt=0)
