"""Checkpoints on the local disk, and the incarnations of a run.

Invariant: a checkpoint is complete or absent. It is written to a temporary file, synced and renamed; its SHA-256 is in
its name and verified on load. An incarnation is claimed by creating a file that must not exist, so that two processes
never get the same one.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper.errors import ConflictError, ContractError, UnavailableError

NUM_KEPT = 2  # the newest, and one to fall back on if it is damaged


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that was saved, as the event ``CheckpointSaved`` records it."""

    path: Path
    sha256: str
    size_bytes: int


class CheckpointStore:
    """The checkpoints and incarnations of one run, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def claim_incarnation(self, *, is_resumed: bool) -> int:
        """Claim the next incarnation of the run, by compare-and-set: 1 for a new run.

        Raises:
            ConflictError: the folder of a new run holds a run already, or another process claimed it first.
        """
        folder = self._folder / "incarnations"
        folder.mkdir(parents=True, exist_ok=True)
        last = max((int(p.name) for p in folder.iterdir()), default=0)
        if last and not is_resumed:
            raise ConflictError(
                f"{self._folder} holds a run already; choose another run_id, or resume the run: `is_resumed=True` in "
                "esper.connect, `--resume` in `esper train`"
            )
        try:
            os.close(os.open(folder / str(last + 1), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError as error:
            problem = f"{self._folder}: another process claimed incarnation {last + 1}; resume a run only once"
            raise ConflictError(problem) from error
        return last + 1

    def save(self, state: dict[str, Any], step: int) -> SavedCheckpoint:
        """Write a checkpoint, which survives a power cut once this returns, and delete all but the newest ones.

        Raises:
            UnavailableError: the disk is full or fails; older checkpoints are intact.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "checkpoint.partial"
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            data = partial.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            path = self._folder / f"checkpoint-{step:010d}-{digest}.pt"
            partial.replace(path)
            _sync_folder(self._folder)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            problem = f"the checkpoint cannot be written to {self._folder}: {error}; free disk space"
            raise UnavailableError(problem) from error
        for old in self._saved()[:-NUM_KEPT]:
            old.unlink(missing_ok=True)
        return SavedCheckpoint(path, digest, len(data))

    def load_newest(self) -> dict[str, Any]:
        """The newest intact checkpoint.

        Raises:
            ContractError: there is none.
        """
        for path in reversed(self._saved()):
            if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem.rsplit("-", 1)[1]:
                loaded: dict[str, Any] = torch.load(path, weights_only=True)
                return loaded
        raise ContractError(f"{self._folder} has no intact checkpoint to resume from: start a new run")

    def _saved(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint-*.pt"))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
