"""Keyset pagination: the last page costs what the first does, and rows that arrive meanwhile shift no page.

Owns the cursor: opaque to clients, valid for one list only. A cursor of another list is a 404: there is no such page.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar
from urllib.parse import parse_qsl, urlencode

from fastapi import HTTPException, Request, Response
from pydantic import AwareDatetime, Field, TypeAdapter

from esper.schemas.base import MAX_INT32, MAX_INT64, Text
from esper.services.urza.api.api_context import api_context
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.response_cache import json_response

Item = TypeVar("Item")
CURSOR_PATTERN = r"^[A-Za-z0-9_-]{1,4000}$"


class Page(ApiModel, Generic[Item]):
    """A page of a list, in the list's order."""

    items: list[Item]
    next: str | None = Field(description="The address of the next page; null on the last one.")


class PageQuery(ApiModel):
    """The parameters of every list."""

    limit: Annotated[int, Field(ge=1, le=500, description="Maximum number of items of a page.")] = 100
    cursor: Annotated[
        str | None, Field(pattern=CURSOR_PATTERN, description="From `next`; without it, the first page.")
    ] = None


@dataclass(frozen=True, slots=True)
class KeyType:
    """A column of an order: the value before all rows, and the type of its values in a cursor."""

    first: Any
    type: Any


END = datetime(9999, 1, 1, tzinfo=UTC)  # after every event; asyncpg has no infinity with a time zone
TEXT = KeyType("", Text)
INT4 = KeyType(-1, Annotated[int, Field(ge=-1, le=MAX_INT32)])
INT8 = KeyType(-1, Annotated[int, Field(ge=-1, le=MAX_INT64)])
LATEST = KeyType(END, Annotated[AwareDatetime, Field(lt=END)])


@dataclass(slots=True)
class Listing:
    """A paginated list: its statement, the (parameter, column, type) of its order, and the statement's SQL file."""

    statement: str
    order: Sequence[tuple[str, str, KeyType]]
    sql_file: str = "urza"
    _cursor_type: TypeAdapter[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        types = [Literal[self.statement], *(key.type for _parameter, _column, key in self.order)]
        self._cursor_type = TypeAdapter(tuple[*types])  # type: ignore[valid-type]

    def after(self, cursor: str | None) -> dict[str, Any]:
        """The parameters that name the last row of the previous page.

        Raises:
            HTTPException: 404, the cursor belongs to another list.
        """
        if cursor is None:
            return {parameter: key.first for parameter, _column, key in self.order}
        try:
            text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
            _name, *values = self._cursor_type.validate_json(text, strict=True)
        except ValueError:  # not base64, or not of these types
            raise HTTPException(404, "this list has no page at this cursor; start again without one") from None
        return {parameter: value for (parameter, _column, _key), value in zip(self.order, values, strict=True)}

    def cursor(self, row: Mapping[str, Any]) -> str:
        """The cursor after a row."""
        keys = [row[column] for _parameter, column, _key in self.order]
        values = [k.isoformat() if isinstance(k, datetime) else k for k in keys]
        text = json.dumps([self.statement, *values], ensure_ascii=False, separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    async def page(self, request: Request, query: PageQuery, topics: Sequence[str], /, **filters: Any) -> Response:
        """Read one page and respond with it."""
        parameters = {"limit": query.limit + 1, **self.after(query.cursor), **filters}
        rows = await api_context(request).reader.all(self.statement, sql_file=self.sql_file, **parameters)
        items, next_page = rows[: query.limit], None
        if len(rows) > query.limit:
            next_page = _address(request, self.cursor(items[-1]))
        return json_response(request, {"items": items, "next": next_page}, topics)


def _address(request: Request, cursor: str) -> str:
    kept = [(n, v) for n, v in parse_qsl(request.url.query, keep_blank_values=True) if n != "cursor"]
    return f"{request.scope.get('root_path', '')}{request.url.path}?{urlencode([*kept, ('cursor', cursor)])}"
