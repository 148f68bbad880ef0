"""Pages: lists that go by keyset, so that the last page costs what the first does and rows that come meanwhile
move nothing.

Owns the cursor: opaque to clients, valid for its own list alone. One that is none of a list's is a 404: there is
no such page.
"""

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import parse_qsl, urlencode

from fastapi import HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from esper.schemas.base import MAX_INT32, MAX_INT64
from esper.services.urza.api.api_context import Library, library_of
from esper.services.urza.api.response_cache import answer

Item = TypeVar("Item")
CURSOR_PATTERN = r"^[A-Za-z0-9_-]{1,4000}$"


class RowModel(BaseModel):
    """Base of what the API shows."""

    model_config = ConfigDict(extra="forbid")


class Page(RowModel, Generic[Item]):
    """Some of a list's items, in its order."""

    items: list[Item]
    next: str | None = Field(description="Where the next page is; null on the last one.")


class PageQuery(BaseModel):
    """What every list takes; a parameter that it does not know is an error."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=500, description="Items of a page, at most.")] = 100
    cursor: Annotated[
        str | None, Field(pattern=CURSOR_PATTERN, description="From `next`; without it, the first page.")
    ] = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A type that a cursor can hold: ``first`` stands before all values, ``read`` gives None for what is none."""

    first: Any
    read: Callable[[Any], Any]


def _text(value: Any) -> str | None:
    if not isinstance(value, str) or "\x00" in value:
        return None
    return value if value.encode(errors="ignore").decode() == value else None  # a lone surrogate is in no column


def _number(greatest: int) -> Callable[[Any], int | None]:
    return lambda v: v if type(v) is int and -1 <= v <= greatest else None


def _time(value: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo is not None and found.year < END.year else None


END = datetime(9999, 1, 1, tzinfo=UTC)  # after every event; asyncpg has no infinity with a time zone
TEXT = Kind("", _text)
INT4 = Kind(-1, _number(MAX_INT32))
INT8 = Kind(-1, _number(MAX_INT64))
LATEST = Kind(END, _time)


@dataclass(frozen=True, slots=True)
class Listing:
    """A list: the statement that reads it, (parameter, column, kind) of its order, and the file of the statement."""

    statement: str
    order: Sequence[tuple[str, str, Kind]]
    room: str = "urza"

    def after(self, cursor: str | None) -> dict[str, Any]:
        """The parameters that name the last row of the page before.

        Raises:
            HTTPException: 404, the cursor is none of this list's.
        """
        if cursor is None:
            return {parameter: kind.first for parameter, _column, kind in self.order}
        try:
            name, *values = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        except (binascii.Error, ValueError, TypeError, RecursionError):
            name, values = None, []
        found = {p: kind.read(v) for (p, _c, kind), v in zip(self.order, values, strict=False)}
        if name != self.statement or len(values) != len(self.order) or None in found.values():
            raise HTTPException(404, "this list has no page at this cursor: begin again without one")
        return found

    def cursor(self, row: Mapping[str, Any]) -> str:
        """The cursor after a row."""
        keys = [row[column] for _parameter, column, _kind in self.order]
        told = [k.isoformat() if isinstance(k, datetime) else k for k in keys]
        text = json.dumps([self.statement, *told], ensure_ascii=False, separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    async def page(self, request: Request, query: PageQuery, topics: Sequence[str], /, **filters: Any) -> Response:
        """Read one page and answer with it."""
        library: Library = library_of(request)
        after = self.after(query.cursor)
        wanted = {"limit": query.limit + 1, **after, **filters}
        rows = await library.rows.all(self.statement, room=self.room, **wanted)
        items, next_page = rows[: query.limit], None
        if len(rows) > query.limit:
            next_page = _at(request, self.cursor(items[-1]))
        return answer(request, {"items": items, "next": next_page}, topics)


def _at(request: Request, cursor: str) -> str:
    kept = [(n, v) for n, v in parse_qsl(request.url.query, keep_blank_values=True) if n != "cursor"]
    return f"{request.scope.get('root_path', '')}{request.url.path}?{urlencode([*kept, ('cursor', cursor)])}"
