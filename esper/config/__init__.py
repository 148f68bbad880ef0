"""Where everything is, and how it is set: one settings object, read once by an entry point.

Sources, strongest first: ESPER_ variables (``ESPER_KAFKA__BOOTSTRAP_SERVERS``), the YAML file, and
the embedded stack that ``esper up`` left running, for what nothing else names. In a notebook:

    from esper.config import get_service_config
    get_service_config("tamiyo").epsilon
"""

from esper.config.sections import (
    KafkaSecurity,
    KafkaSettings,
    LoggingSettings,
    PostgresSettings,
    S3Settings,
    SectionModel,
)
from esper.config.settings import (
    OWNED_SECTIONS,
    SECTIONS,
    Settings,
    get_service_config,
    load_settings,
    section_model,
)
from esper.config.sources import (
    CONFIG_VARIABLE,
    ENV_DELIMITER,
    ENV_PREFIX,
    STACK_FILE,
    STATE_DIR_VARIABLE,
    state_dir,
)

__all__ = [
    "CONFIG_VARIABLE",
    "ENV_DELIMITER",
    "ENV_PREFIX",
    "OWNED_SECTIONS",
    "SECTIONS",
    "STACK_FILE",
    "STATE_DIR_VARIABLE",
    "KafkaSecurity",
    "KafkaSettings",
    "LoggingSettings",
    "PostgresSettings",
    "S3Settings",
    "SectionModel",
    "Settings",
    "get_service_config",
    "load_settings",
    "section_model",
    "state_dir",
]
