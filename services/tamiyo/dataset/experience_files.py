"""Experiences in a folder: numbers and views as safetensors, a manifest as JSON. Nothing is ever unpickled.

Invariant: experiences that are read have the digest that the manifest names.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from esper.errors import ConflictError, ContractError
from esper.schemas.enums import ReportMethod
from esper.services.tamiyo.dataset.experiences import Experiences, StoredExperience

FORMAT = 2
MANIFEST, NUMBERS = "manifest.json", "experiences.safetensors"
METHODS: tuple[ReportMethod | None, ...] = (None, *ReportMethod)

Arrays = dict[str, NDArray[Any]]

_PLAIN_COLUMNS: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "incarnation": np.int32,
        "boundary": np.int32,
        "step": np.int64,
        "chosen": np.int32,
        "probability": np.float64,
        "policy_version": np.int32,
        "reward": np.float64,
        "is_placebo": np.uint8,
    }
)
"""Fields that are stored as they are, with the type of their array."""


def write_experiences(folder: Path, experiences: Experiences, origin: Mapping[str, Any]) -> None:
    """Write a new folder atomically.

    Args:
        origin: further entries of the manifest, from ``describe_origin``.

    Raises:
        ConflictError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} already exists; name a new folder, or remove it")
    runs, policies = _names(experiences)
    manifest = {
        "format": FORMAT,
        "digest": experiences.digest,
        "num_experiences": len(experiences),
        "runs": runs,
        "policies": policies,
        "methods": [method or "none" for method in METHODS],
        **origin,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(_arrays(experiences, runs, policies), partial / NUMBERS)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder.

    Raises:
        ContractError: the folder holds no experiences, or has another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(
            f"{folder} holds no experiences: {error}; `esper tamiyo replay --into` writes some"
        ) from None
    if version != FORMAT:
        raise ContractError(f"{folder} has format {version}, this program reads {FORMAT}: replay again")
    return dict(manifest)


def read_experiences(folder: Path) -> Experiences:
    """Read what ``write_experiences`` wrote.

    Raises:
        ContractError: it is damaged, or was altered.
    """
    manifest = read_manifest(folder)
    try:
        found = Experiences(_stored(load_file(folder / NUMBERS), manifest))
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ContractError(f"{folder / NUMBERS} cannot be read: {error}; replay again") from None
    if found.digest != manifest["digest"]:
        raise ContractError(
            f"{folder} was altered: its experiences have digest {found.digest[:16]}, the manifest says "
            f"{manifest['digest'][:16]}; replay again"
        )
    return found


def _names(experiences: Experiences) -> tuple[list[str], list[str]]:
    return list(experiences.runs), sorted({e.policy_id for e in experiences.stored})


def _arrays(experiences: Experiences, runs: list[str], policies: list[str]) -> Arrays:
    stored = experiences.stored
    variances = [np.nan if e.reward_variance is None else e.reward_variance for e in stored]
    run_codes = {name: n for n, name in enumerate(runs)}
    policy_codes = {name: n for n, name in enumerate(policies)}
    return {
        **{name: np.array([getattr(e, name) for e in stored], dtype) for name, dtype in _PLAIN_COLUMNS.items()},
        "run": np.array([run_codes[e.run_id] for e in stored], np.int32),
        "policy": np.array([policy_codes[e.policy_id] for e in stored], np.int32),
        "reward_variance": np.array(variances, np.float64),
        "method": np.array([METHODS.index(e.method) for e in stored], np.uint8),
        "decision_id": _byte_rows([e.decision_id.bytes for e in stored], 16),
        "view_digest": _byte_rows([bytes.fromhex(e.view_digest) for e in stored], 32),
        "view_ends": np.cumsum([0, *(len(e.view_zstd) for e in stored)]).astype(np.int64),
        "views_zstd": np.frombuffer(b"".join(e.view_zstd for e in stored), np.uint8).copy(),
    }


def _byte_rows(rows: list[bytes], width: int) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), width).copy()


def _stored(arrays: Arrays, manifest: Mapping[str, Any]) -> list[StoredExperience]:
    methods = [None if name == "none" else ReportMethod(name) for name in manifest["methods"]]
    views, ends = arrays["views_zstd"].tobytes(), arrays["view_ends"].tolist()
    columns = {name: arrays[name].tolist() for name in (*_PLAIN_COLUMNS, "run", "policy", "reward_variance", "method")}
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [
        StoredExperience(
            **{name: row[name] for name in _PLAIN_COLUMNS if name != "is_placebo"},
            run_id=manifest["runs"][row["run"]],
            policy_id=manifest["policies"][row["policy"]],
            reward_variance=None if np.isnan(row["reward_variance"]) else row["reward_variance"],
            method=methods[row["method"]],
            decision_id=UUID(bytes=arrays["decision_id"][n].tobytes()),
            view_digest=arrays["view_digest"][n].tobytes().hex(),
            view_zstd=views[ends[n] : ends[n + 1]],
            is_placebo=bool(row["is_placebo"]),
        )
        for n, row in enumerate(rows)
    ]
