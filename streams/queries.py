"""The SQL of the projections, by name, from the .sql files beside this module."""

from functools import cache
from importlib.resources import files
from typing import Any

import aiosql


@cache
def queries(name: str) -> Any:
    """The queries of ``sql/<name>.sql``, each a coroutine function of (connection, parameters)."""
    text = files("esper.streams").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")
    return aiosql.from_str(text, "asyncpg", mandatory_parameters=False)
