"""Where the experiences in a folder come from, in its manifest, so that the same part of the log can be read again."""

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
    """The part of the log that a folder was read from. Of ``log_range`` only the patterns of runs are kept."""

    digest: str
    log_range: ReplayRange
    bounds: OffsetBounds
    measured: Mapping[str, tuple[int, int]]
    rent: Any
    placebos: tuple[tuple[str, float], ...] = ()


def describe_origin(replay: Replay, log_range: ReplayRange, rent: RentSettings) -> dict[str, Any]:
    """Return the entries of the manifest: the range as offsets, the exclusions, and how much was measured."""
    return {
        **_describe_range(log_range),
        "begins": _format_offsets(replay.bounds.begins),
        "ends": _format_offsets(replay.bounds.ends),
        "lost": _format_offsets(replay.bounds.lost),
        "num_decisions": replay.joined.num_decisions,
        "set_aside": count_by_reason(replay.exclusions),
        "measured": {action: list(counts) for action, counts in replay.joined.measured.items()},
        "rent": rent.model_dump(),
        "placebos": [list(one) for one in replay.joined.placebos],
    }


def was_read_with(folder: Path, log_range: ReplayRange) -> bool:
    """Return whether the folder was read with the same --from, --until and --runs.

    Raises:
        ContractError: the folder holds no experiences.
    """
    manifest, wanted = read_manifest(folder), _describe_range(log_range)
    return {name: manifest.get(name) for name in wanted} == wanted


def read_origin(folder: Path) -> Origin:
    """Read what ``describe_origin`` returned.

    Raises:
        ContractError: the folder holds no experiences, or its manifest has no origin.
    """
    manifest = read_manifest(folder)
    try:
        begins, ends, lost = (_parse_offsets(manifest[name]) for name in ("begins", "ends", "lost"))
        measured = {
            action: (int(num_rewarded), int(num_eligible))
            for action, (num_rewarded, num_eligible) in manifest["measured"].items()
        }
        log_range = ReplayRange(runs=tuple(manifest["patterns"]))
        placebos = tuple((str(run_id), float(value)) for run_id, value in manifest.get("placebos", ()))
        bounds = OffsetBounds(lost, begins, ends)
        return Origin(manifest["digest"], log_range, bounds, measured, manifest["rent"], placebos)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ContractError(f"the manifest of {folder} has no valid origin: {error!r}; replay again") from None


def _describe_range(log_range: ReplayRange) -> dict[str, Any]:
    since = str(log_range.since) or "EARLIEST"
    return {"from": since, "until": str(log_range.until), "patterns": list(log_range.runs)}


def _format_offsets(offsets: Offsets) -> dict[str, int]:
    return {f"{topic}[{n}]": offset for (topic, n), offset in sorted(offsets.items())}


def _parse_offsets(offsets: Mapping[str, int]) -> dict[TopicPartition, int]:
    found = {}
    for name, offset in offsets.items():
        topic, _bracket, number = name.partition("[")
        found[topic, int(number.removesuffix("]"))] = int(offset)
    return found
