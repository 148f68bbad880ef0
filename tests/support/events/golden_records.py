"""The golden records: one file for each event type and version, readable forever.

A file has a record as it lies in the log (key, headers, value as text) and the value that it decodes to.
`PYTHONPATH=tests python -m support.events.golden_records` writes the files of types that have none; it never changes a file that
exists. When a type gets a new version, edit the ``expected`` part of its old files to what the upcasters make of them.
"""

import json
from pathlib import Path
from typing import Any

from support.events.event_examples import BY_TYPE, wrap_event
from support.paths import TESTS

from esper.oona.cloudevents import decode, encode
from esper.schemas.registry import REGISTRY

FOLDER = TESTS / "contract" / "golden"


def read(path: Path) -> dict[str, Any]:
    """The content of a golden file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def decode_golden(golden: dict[str, Any]) -> dict[str, Any]:
    """The event that the record of a golden file decodes to, as JSON data."""
    headers = [(name, text.encode()) for name, text in golden["headers"].items()]
    return decode(golden["topic"], golden["value"].encode(), headers).model_dump(mode="json")


def write_missing() -> list[str]:
    """Write the missing files; returns their event types."""
    missing = [t for t in REGISTRY if not (FOLDER / f"{t}.json").exists()]
    for event_type in missing:
        record = encode(wrap_event(BY_TYPE[event_type]))
        golden = {
            "topic": record.topic,
            "key": (record.key or b"").decode(),
            "headers": {name: text.decode() for name, text in record.headers},
            "value": (record.value or b"").decode(),
        }
        golden["expected"] = decode_golden(golden)
        text = json.dumps(golden, indent=2, ensure_ascii=False) + "\n"
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{event_type}.json").write_text(text, encoding="utf-8")
    return missing


if __name__ == "__main__":
    print("\n".join(write_missing()) or "no golden record is missing")
