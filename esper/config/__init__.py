"""Settings of all processes: one immutable object, read once by an entry point.

Sources, highest priority first: environment variables (``ESPER_KAFKA__BOOTSTRAP_SERVERS``), the YAML
file, and the embedded stack that ``esper up`` started. In a notebook:

    from esper.config import get_service_config
    get_service_config("tamiyo").epsilon

Public names:

- ``load_settings`` reads all sources into a ``Settings``; ``get_service_config`` returns one section of it.
- ``KafkaSettings`` with ``KafkaSecurity``, ``PostgresSettings``, ``S3Settings`` and ``LoggingSettings``
  are the sections that Esper itself needs. ``SectionModel`` is the base class of every section.
- ``SECTIONS`` are the names of all sections; ``SERVICE_SECTIONS`` those whose model belongs to a
  service; ``section_model`` returns the model of a section.
- ``state_dir`` is the folder of the embedded stack's state, and ``STACK_FILE`` the file in it that
  describes the running stack.
- ``ENV_PREFIX``, ``ENV_DELIMITER``, ``CONFIG_VARIABLE`` and ``STATE_DIR_VARIABLE`` are the parts of
  the names of environment variables.
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
    SECTIONS,
    SERVICE_SECTIONS,
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
    "SECTIONS",
    "SERVICE_SECTIONS",
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
