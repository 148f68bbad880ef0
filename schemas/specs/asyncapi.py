"""The AsyncAPI 3.0.0 document of Oona: server, channels (the topics), operations, messages.

It is generated from the registry and the topics, so that a new type or topic is included without further work.
Payloads are references to the JSON Schemas; headers are CloudEvents 1.0, Kafka binding, binary mode.
"""

from collections.abc import Sequence
from typing import Any

from esper.schemas.base import TEXT_PATTERN
from esper.schemas.messages import TRACEPARENT_PATTERN
from esper.schemas.registry import REGISTRY, Registration, Registry
from esper.schemas.specs.json_schema import UUID_PATTERN, schema_id
from esper.schemas.topics import TOPICS, TopicSpec

ASYNCAPI = "3.0.0"
BINDING = "0.5.0"
PAYLOAD_FORMAT = "application/schema+json;version=draft-2020-12"
DEAD_LETTER = "deadLetter"

Json = dict[str, Any]


def document(api_version: str, registry: Registry = REGISTRY, topics: Sequence[TopicSpec] = TOPICS) -> Json:
    """The document as JSON data. ``api_version`` is the version of Esper."""
    types = {spec: _types_on(spec, registry) for spec in topics}
    channels = [c for spec in topics for c in (_channel(spec, types[spec]), _dead_letter_channel(spec.dead_letters))]
    messages = {t: _message(t, registry.find(t)) for on_topic in types.values() for t in on_topic}
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
                "description": "The broker of infra/kafka.yml. ESPER_KAFKA__BOOTSTRAP_SERVERS selects another.",
            }
        },
        "channels": dict(channels),
        "operations": {
            f"{action}:{spec.name}": _operation(action, spec, registry, on_topic)
            for spec, on_topic in types.items()
            for action in ("send", "receive")
        },
        "components": {
            "messages": {**messages, DEAD_LETTER: _dead_letter()},
            "schemas": {"cloudEventHeaders": _headers()},
        },
    }


def _types_on(spec: TopicSpec, registry: Registry) -> list[str]:
    """All types whose records can be on a topic, old versions included, since they stay in the log."""
    return [t for t in (*registry, *registry.upcasters) if registry.find(t).topic == spec]


def _channel(spec: TopicSpec, types: list[str]) -> tuple[str, Json]:
    return spec.name, {
        "address": spec.name,
        "description": "The events of one key are in order.",
        "messages": {t: {"$ref": f"#/components/messages/{t}"} for t in types},
        "bindings": {"kafka": _topic_binding(spec)},
    }


def _dead_letter_channel(spec: TopicSpec) -> tuple[str, Json]:
    return spec.name, {
        "address": spec.name,
        "description": "Records that could not be decoded, from the topic of the same name without .dlq.",
        "messages": {DEAD_LETTER: {"$ref": f"#/components/messages/{DEAD_LETTER}"}},
        "bindings": {"kafka": _topic_binding(spec)},
    }


def _topic_binding(spec: TopicSpec) -> Json:
    return {
        "topic": spec.name,
        "partitions": spec.num_partitions,
        "topicConfiguration": {"cleanup.policy": ["delete"], "retention.ms": spec.retention_ms},
        "bindingVersion": BINDING,
    }


def _operation(action: str, spec: TopicSpec, registry: Registry, types: list[str]) -> Json:
    channel = f"#/channels/{spec.name}"
    allowed = [t for t in types if action == "receive" or t in registry]  # old versions are read, never written
    messages = [{"$ref": f"{channel}/messages/{t}"} for t in allowed]
    return {"action": action, "channel": {"$ref": channel}, "messages": messages}


def _message(event_type: str, entry: Registration) -> Json:
    """The message of a type, with the texts of the model that reads it: for an old version that of the newest."""
    summary, _, rest = (entry.model.__doc__ or "").strip().partition("\n")
    if event_type != entry.type:
        summary, rest = f"Old version, read as {entry.type}.", ""
    type_headers = {"ce_type": {"const": event_type}, "ce_dataschema": {"const": schema_id(event_type)}}
    described = {"description": "\n".join(line.strip() for line in rest.strip().splitlines())} if rest.strip() else {}
    return {
        "name": event_type,
        "title": entry.model.__name__,
        "summary": summary,
        **described,
        "contentType": "application/json",
        "correlationId": {"location": "$message.header#/ce_correlationid", "description": "The record key."},
        "headers": {"allOf": [{"$ref": "#/components/schemas/cloudEventHeaders"}, {"properties": type_headers}]},
        "payload": {"schemaFormat": PAYLOAD_FORMAT, "schema": {"$ref": f"./json/{event_type}.json"}},
        "bindings": {"kafka": {"key": {"type": "string", "description": entry.key_field}, "bindingVersion": BINDING}},
    }


def _dead_letter() -> Json:
    return {
        "name": DEAD_LETTER,
        "title": "A record that could not be decoded",
        "summary": "The record's key, value and headers byte for byte; esper_dlq_ headers have reason and position.",
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
        "ce_id": {**uuid, "description": "The id of the event; a resend has the same."},
        "ce_source": {**text, "maxLength": 255},
        "ce_type": text,
        "ce_time": {"type": "string", "format": "date-time"},
        "ce_dataschema": {"type": "string", "format": "uri"},
        "content-type": {"const": "application/json"},
        "ce_correlationid": {**text, "description": "The record key: the run, blueprint, policy or topic."},
        "ce_causationid": {**uuid, "description": "The id of the event that caused this one."},
        "traceparent": {"type": "string", "pattern": TRACEPARENT_PATTERN, "description": "W3C Trace Context."},
    }
    optional = ("ce_causationid", "traceparent")
    return {"type": "object", "properties": properties, "required": [n for n in properties if n not in optional]}
