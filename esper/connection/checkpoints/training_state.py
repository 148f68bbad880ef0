"""The content of a checkpoint: everything that a resumed run needs to continue bit for bit.

``TrainingState`` is the part that all ranks share: model, seeds, optimizer, scheduler and scaler. ``rank_state`` is the
part of each rank: random states, and the loop's own state. Invariant: plain values and tensors only, so that a
checkpoint loads with ``weights_only=True``.
"""

import ast
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.errors import ContractError
from esper.kasmina.model import MorphableModel

FORMAT = 2
"""The format of a checkpoint. Format 1 had no number, and one rank."""


@dataclass(frozen=True, eq=False, slots=True)
class TrainingState:
    """What an optimizer step changes. ``scheduler`` and ``scaler`` are None or have ``state_dict``."""

    model: MorphableModel
    optimizer: Optimizer
    scheduler: Any = None
    scaler: Any = None

    def __post_init__(self) -> None:
        self.model.grad_scaler = self.scaler
        self.model.join_awake(self.optimizer)

    def to_dict(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return {
            "format": FORMAT,
            "model": dict(self.model.state_dict()),
            "seeds": self.model.seed_state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def load_dict(self, saved: Mapping[str, Any]) -> None:
        """The inverse of ``to_dict``.

        Raises:
            ContractError: the checkpoint has another format or another model, or was saved with other parts.
        """
        verify_format(saved)
        for name, part in (("scheduler", self.scheduler), ("scaler", self.scaler)):
            if (saved[name] is None) != (part is None):
                saved_with = "without" if saved[name] is None else "with"
                raise ContractError(f"the checkpoint was saved {saved_with} a {name}: pass the same parts to connect()")
        self.model.load_state_dict(saved["model"])
        self.model.load_seed_state(saved["seeds"], self.optimizer)
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, part in (("scheduler", self.scheduler), ("scaler", self.scaler)):
            if part is not None:
                part.load_state_dict(saved[name])
        self.model.grad_scaler = self.scaler


def verify_format(saved: Mapping[str, Any]) -> None:
    """Check the format of a checkpoint.

    Raises:
        ContractError: this version cannot read it.
    """
    if saved.get("format") != FORMAT:
        raise ContractError(
            f"the checkpoint has format {saved.get('format', 1)}, and this version of Esper reads format {FORMAT}: "
            "finish the run with the version that began it, or start a new run"
        )


def rank_state(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """The state of this rank: random states of PyTorch, CUDA and Python, and ``extra``, the training loop's own."""
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python_rng": repr(random.getstate()),
        "extra": dict(extra or {}),
    }


def load_rank_state(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Restore a rank's random states; returns its ``extra``."""
    torch.set_rng_state(saved["rng"])
    if saved["cuda_rng"]:
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    random.setstate(ast.literal_eval(saved["python_rng"]))
    extra: dict[str, Any] = saved["extra"]
    return extra


def to_bytes(state: Mapping[str, Any]) -> Tensor:
    """Serialize plain values and tensors into one uint8 tensor, for another rank."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def from_bytes(data: Tensor) -> dict[str, Any]:
    """The inverse of ``to_bytes``. Loads no code."""
    loaded: dict[str, Any] = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
    return loaded
