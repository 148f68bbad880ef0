"""The AsyncAPI 3.0.0 document of Oona: server, channels (the topics), operations, messages.

Made from the registry and the topics, so a new type or topic is in it by itself. Payloads are
references to the JSON Schemas beside it; headers are CloudEvents 1.0, Kafka binding, binary mode.
"""

from typing import Any

from esper.schemas.base import TEXT_PATTERN
from esper.schemas.json_schema import UUID_PATTERN, schema_id
from esper.schemas.messages import TRACEPARENT_PATTERN
from esper.schemas.registry import REGISTRY, Registration, types_on
from esper.schemas.topics import TOPICS, TopicSpec

ASYNCAPI = "3.0.0"
BINDING = "0.5.0"
PAYLOAD_FORMAT = "application/schema+json;version=draft-2020-12"
DEAD_LETTER = "deadLetter"

Json = dict[str, Any]


def document(api_version: str) -> Json:
    """The whole document; ``api_version`` is that of Esper."""
    channels = [c for spec in TOPICS for c in (_channel(spec), _dead_letter_channel(spec.dead_letters))]
    return {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "Oona, the event bus of Esper",
            "version": api_version,
            "description": "Every event of a network that grows while it trains. Consumers refuse unknown "
            "fields and upgrade before producers; a released type never changes, a new version is a new type.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "kafka": {
                "host": "localhost:9092",
                "protocol": "kafka",
                "description": "infra/kafka.yml; ESPER_KAFKA__BOOTSTRAP_SERVERS names another.",
            }
        },
        "channels": dict(channels),
        "operations": {
            f"{action}:{spec.name}": _operation(action, spec) for spec in TOPICS for action in ("send", "receive")
        },
        "components": {
            "messages": {**{r.type: _message(r) for r in REGISTRY.values()}, DEAD_LETTER: _dead_letter()},
            "schemas": {"cloudEventHeaders": _headers()},
        },
    }


def _channel(spec: TopicSpec) -> tuple[str, Json]:
    entries = types_on(spec)
    return spec.name, {
        "address": spec.name,
        "description": f"Keyed by {entries[0].key_field}: the events of one key are in order.",
        "messages": {r.type: {"$ref": f"#/components/messages/{r.type}"} for r in entries},
        "bindings": {"kafka": _topic(spec)},
    }


def _dead_letter_channel(spec: TopicSpec) -> tuple[str, Json]:
    return spec.name, {
        "address": spec.name,
        "description": "Records of the topic it is named after that could not be decoded.",
        "messages": {DEAD_LETTER: {"$ref": f"#/components/messages/{DEAD_LETTER}"}},
        "bindings": {"kafka": _topic(spec)},
    }


def _topic(spec: TopicSpec) -> Json:
    return {
        "topic": spec.name,
        "partitions": spec.num_partitions,
        "topicConfiguration": {"cleanup.policy": ["delete"], "retention.ms": spec.retention_ms},
        "bindingVersion": BINDING,
    }


def _operation(action: str, spec: TopicSpec) -> Json:
    channel = f"#/channels/{spec.name}"
    messages = [{"$ref": f"{channel}/messages/{r.type}"} for r in types_on(spec)]
    return {"action": action, "channel": {"$ref": channel}, "messages": messages}


def _message(entry: Registration) -> Json:
    summary, _, rest = (entry.model.__doc__ or "").strip().partition("\n")
    own = {"ce_type": {"const": entry.type}, "ce_dataschema": {"const": schema_id(entry.type)}}
    described = {"description": "\n".join(line.strip() for line in rest.strip().splitlines())} if rest.strip() else {}
    return {
        "name": entry.type,
        "title": entry.model.__name__,
        "summary": summary,
        **described,
        "contentType": "application/json",
        "correlationId": {"location": "$message.header#/ce_correlationid", "description": "The run, or other key."},
        "headers": {"allOf": [{"$ref": "#/components/schemas/cloudEventHeaders"}, {"properties": own}]},
        "payload": {"schemaFormat": PAYLOAD_FORMAT, "schema": {"$ref": f"./json/{entry.type}.json"}},
        "bindings": {"kafka": {"key": {"type": "string", "description": entry.key_field}, "bindingVersion": BINDING}},
    }


def _dead_letter() -> Json:
    return {
        "name": DEAD_LETTER,
        "title": "A record that could not be decoded",
        "summary": "Key, value and headers of the record, byte for byte; esper_dlq_ headers say why, and where it lay.",
        "headers": {
            "type": "object",
            "properties": {
                "esper_dlq_reason": {"type": "string"},
                "esper_dlq_topic": {"type": "string"},
                "esper_dlq_partition": {"type": "string"},
                "esper_dlq_offset": {"type": "string"},
            },
            "required": ["esper_dlq_reason", "esper_dlq_topic", "esper_dlq_partition", "esper_dlq_offset"],
        },
        "payload": {"description": "Any bytes."},
        "bindings": {"kafka": {"bindingVersion": BINDING}},
    }


def _headers() -> Json:
    uuid = {"type": "string", "format": "uuid", "pattern": UUID_PATTERN}
    text = {"type": "string", "minLength": 1, "pattern": TEXT_PATTERN}
    properties = {
        "ce_specversion": {"const": "1.0"},
        "ce_id": {**uuid, "description": "The same for every resend."},
        "ce_source": {**text, "maxLength": 255},
        "ce_type": text,
        "ce_time": {"type": "string", "format": "date-time"},
        "ce_dataschema": {"type": "string", "format": "uri"},
        "content-type": {"const": "application/json"},
        "ce_correlationid": {**text, "description": "The run, or what else the record is keyed by."},
        "ce_causationid": {**uuid, "description": "The event that caused this one."},
        "traceparent": {"type": "string", "pattern": TRACEPARENT_PATTERN, "description": "W3C Trace Context."},
    }
    optional = ("ce_causationid", "traceparent")
    return {"type": "object", "properties": properties, "required": [n for n in properties if n not in optional]}
