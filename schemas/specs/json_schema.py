"""The JSON Schema (draft 2020-12) of an event's value: the values that Esper accepts on the wire.

It is generated from the model alone. Two rules cannot be expressed in it, because they compare two fields: the
signals of a report have its layer, and a registered kernel has its blueprint.
"""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from esper.schemas.events import Event

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_BASE = "https://esper.dev/schemas/"
UUID_PATTERN = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
BASE64_PATTERN = r"^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


def schema_id(event_type: str) -> str:
    """The URI of a type's published schema, which every record of the type names."""
    return f"{SCHEMA_BASE}{event_type}.json"


def schema_of(model: type[Event]) -> dict[str, Any]:
    """The schema of a model's values as JSON data."""
    generated = model.model_json_schema(schema_generator=_Generator, mode="validation")
    event_type = model.model_fields["type"].default
    return {"$schema": DIALECT, "$id": schema_id(event_type), **generated}


class _Generator(GenerateJsonSchema):
    """Pydantic's schema without generated titles, and with patterns, since not every reader checks ``format``."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def uuid_schema(self, schema: core_schema.UuidSchema) -> JsonSchemaValue:
        return {"type": "string", "format": "uuid", "pattern": UUID_PATTERN}

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        """Use ``propertyNames``: pydantic's ``patternProperties`` would accept keys that do not match."""
        keys = self.generate_inner(schema["keys_schema"])
        values = self.generate_inner(schema["values_schema"])
        return {"type": "object", "additionalProperties": values, "propertyNames": keys}

    def generate_inner(self, schema: Any) -> JsonSchemaValue:
        generated = super().generate_inner(schema)
        if generated.get("format") == "base64":
            return {"type": "string", "contentEncoding": "base64", "pattern": BASE64_PATTERN}
        return generated
