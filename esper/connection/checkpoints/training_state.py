"""What a training process holds, in a checkpoint: all that must come back for it to go on to the bit.

``Training`` is what all ranks share: the model, its seeds, optimizer, scheduler and scaler.
``own_state`` is what each rank has for itself: random numbers, and the loop's own state.
Invariant: plain values and tensors only, so that it loads with ``weights_only=True``.
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
"""Of a checkpoint. The first format had no number, and one rank."""


@dataclass(frozen=True, eq=False, slots=True)
class Training:
    """The parts that a step changes; ``scheduler`` and ``scaler`` may be anything with a state_dict."""

    model: MorphableModel
    optimizer: Optimizer
    scheduler: Any = None
    scaler: Any = None

    def __post_init__(self) -> None:
        self.model.grad_scaler = self.scaler
        self.model.join_awake(self.optimizer)

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
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
            ContractError: another format, another model, or a part that was saved and is missing now.
        """
        verify_format(saved)
        for name, part in (("scheduler", self.scheduler), ("scaler", self.scaler)):
            if (saved[name] is None) != (part is None):
                was = "without" if saved[name] is None else "with"
                raise ContractError(f"the checkpoint was saved {was} a {name}: give connect() the same parts")
        self.model.load_state_dict(saved["model"])
        self.model.load_seed_state(saved["seeds"], self.optimizer)
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, part in (("scheduler", self.scheduler), ("scaler", self.scaler)):
            if part is not None:
                part.load_state_dict(saved[name])
        self.model.grad_scaler = self.scaler


def verify_format(saved: Mapping[str, Any]) -> None:
    """See that a checkpoint can be read.

    Raises:
        ContractError: it is of another format.
    """
    if saved.get("format") != FORMAT:
        raise ContractError(
            f"a checkpoint of format {saved.get('format', 1)}, and this Esper reads format {FORMAT}: "
            "end the run with the version that began it, or start a new one"
        )


def own_state(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """What this process has for itself; ``extra`` is the loop's own."""
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python_rng": repr(random.getstate()),
        "extra": dict(extra or {}),
    }


def load_own_state(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Draw on as the saved process would have; gives its ``extra``."""
    torch.set_rng_state(saved["rng"])
    if saved["cuda_rng"]:
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    random.setstate(ast.literal_eval(saved["python_rng"]))
    extra: dict[str, Any] = saved["extra"]
    return extra


def to_bytes(state: Mapping[str, Any]) -> Tensor:
    """Plain values and tensors as one uint8 tensor, to be sent to another rank."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def from_bytes(data: Tensor) -> dict[str, Any]:
    """The inverse of ``to_bytes``; unpickles no code."""
    loaded: dict[str, Any] = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
    return loaded
