"""What a folder of experiences says of where they come from, so that the same part of the log can be read again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esper.errors import ContractError
from esper.oona.records import TopicPartition
from esper.services.tamiyo.dataset.exclusions import count_by_reason
from esper.services.tamiyo.dataset.experience_files import read_manifest
from esper.services.tamiyo.dataset.log_ranges import OffsetBounds, ReplayRange
from esper.services.tamiyo.dataset.log_replay import Replay
from esper.services.tamiyo.settings import RentSettings
from esper.streams.replay.replay_log_reader import Offsets


class Origin(NamedTuple):
    """Where the experiences of a folder come from."""

    digest: str
    asked: ReplayRange
    bounds: OffsetBounds
    measured: Mapping[str, tuple[int, int]]
    rent: Any
    placebos: tuple[tuple[str, float], ...] = ()


def describe_origin(replay: Replay, asked: ReplayRange, rent: RentSettings) -> dict[str, Any]:
    """For the manifest: the range as offsets, what was set aside, and how much was measured."""
    return {
        **_asked(asked),
        "begins": _told(replay.bounds.begins),
        "ends": _told(replay.bounds.ends),
        "lost": _told(replay.bounds.lost),
        "num_decisions": replay.joined.num_decisions,
        "set_aside": count_by_reason(replay.exclusions),
        "measured": {action: list(counts) for action, counts in replay.joined.measured.items()},
        "rent": rent.model_dump(),
        "placebos": [list(one) for one in replay.joined.placebos],
    }


def was_read_with(folder: Path, asked: ReplayRange) -> bool:
    """Whether the folder was made of the part of the log that is asked for, in the same words.

    Raises:
        ContractError: the folder holds no experiences.
    """
    manifest, wanted = read_manifest(folder), _asked(asked)
    return {name: manifest.get(name) for name in wanted} == wanted


def read_origin(folder: Path) -> Origin:
    """What ``origin_of`` told.

    Raises:
        ContractError: the folder holds no experiences, or does not say where they come from.
    """
    manifest = read_manifest(folder)
    try:
        begins, ends, lost = (_offsets(manifest[name]) for name in ("begins", "ends", "lost"))
        measured = {action: (int(told), int(all_)) for action, (told, all_) in manifest["measured"].items()}
        asked = ReplayRange(runs=tuple(manifest["patterns"]))
        placebos = tuple((str(run_id), float(value)) for run_id, value in manifest.get("placebos", ()))
        return Origin(manifest["digest"], asked, OffsetBounds(lost, begins, ends), measured, manifest["rent"], placebos)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ContractError(f"{folder} does not say where its experiences come from: {error!r}; replay again") from None


def _asked(asked: ReplayRange) -> dict[str, Any]:
    return {"from": str(asked.since) or "EARLIEST", "until": str(asked.until), "patterns": list(asked.runs)}


def _told(offsets: Offsets) -> dict[str, int]:
    return {f"{topic}[{n}]": offset for (topic, n), offset in sorted(offsets.items())}


def _offsets(told: Mapping[str, int]) -> dict[TopicPartition, int]:
    found = {}
    for place, offset in told.items():
        topic, _bracket, number = place.partition("[")
        found[topic, int(number.removesuffix("]"))] = int(offset)
    return found
