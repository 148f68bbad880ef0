"""Fit the network to experiences: what reward follows which choice in which view.

The reward of what was chosen is regressed (Huber loss) by the gain of that choice, and by the value of the
state. Experiences come by priority (``dataset/replay_buffer.py``). Gradients of the mini-batches of one batch
are added up, clipped and applied; the learning rate goes one cycle up and down (Smith & Topin 2018).
What is looked at and kept is a moving average of the weights (Polyak & Juditsky 1992), as rewards this noisy ask
for. After every ``eval_every`` batches the validation runs are looked at. Few runs cannot tell a small difference from
chance: the newest average is kept unless its loss is worse than the best one by more than the difference's standard
error over runs (as Breiman et al. 1984 choose a tree's size). ``patience`` looks one after the other at worse ones end
it. At last gains are multiplied with the slope of reward over gain on the validation runs, a standard error more,
within 0..1: what is clearly too much is expected no more.

Invariant: the same experiences, settings and machine give the same weights to the bit, also when training
was interrupted and went on from ``state_dict``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esper.errors import ContractError
from esper.graph.features import Level
from esper.services.tamiyo.control.legal_choices import SingleChoice, legal_choices
from esper.services.tamiyo.dataset.experiences import Experience
from esper.services.tamiyo.dataset.replay_buffer import PrioritizedReplay
from esper.services.tamiyo.gnn.gnn_policy import KnownBlueprints
from esper.services.tamiyo.gnn.graph_batch import UNKNOWN_BLUEPRINT, GraphBatch
from esper.services.tamiyo.gnn.network import Dropout, NetworkShape, PolicyNetwork
from esper.services.tamiyo.gnn.settings import TrainingSettings
from esper.services.tamiyo.gnn.view_arrays import ViewArrays, read_view

MIN_SCALE = 1e-6
"""Rewards that differ by less than this are no signal."""


class Curve(NamedTuple):
    """How training stands: losses are Huber losses in units of the reward's scale."""

    batch: int
    num_batches: int
    learning_rate: float
    train_loss: float
    validation_loss: float | None


@dataclass(frozen=True)
class TrainedNetwork:
    """A fitted network, and what it knows by name.

    Attributes:
        validation_loss: of the weights that were kept, before gains are calibrated.
        baseline_loss: the same loss of a network that expects nothing of any choice.
        num_batches: how many they were learnt from.
    """

    network: PolicyNetwork
    blueprints: KnownBlueprints
    validation_loss: float
    baseline_loss: float
    num_batches: int


class _Rows(NamedTuple):
    """Experiences as the network reads them: each view with what was chosen in it alone."""

    arrays: Sequence[ViewArrays]
    is_wait: NDArray[np.bool_]
    reward: NDArray[np.float32]
    run: NDArray[np.int64]


class PolicyTrainer:
    """Fits one network. ``step`` learns from one batch; ``fit`` does all.

    Args:
        train: what is learnt from.
        validation: experiences of other runs.

    Raises:
        ContractError: there is nothing to learn from, or nothing to be held against.
    """

    def __init__(
        self, train: Sequence[Experience], validation: Sequence[Experience], settings: TrainingSettings
    ) -> None:
        self._settings = settings
        if not train or not validation:
            raise ContractError(
                f"{len(train)} experiences to learn from, {len(validation)} to validate on: more runs are needed"
            )
        self.blueprints = KnownBlueprints(_blueprints(train))
        self._train, self._validation = self._rows(train), self._rows(validation)
        self._generator = torch.Generator().manual_seed(settings.rng_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.rng_seed)
            shape = NetworkShape(settings.width, settings.rounds, len(self.blueprints.names))
            self.network = PolicyNetwork(shape)
        self._scale_to(self._train)
        self._averaged = AveragedModel(self.network, multi_avg_fn=_moving(settings.weight_average_decay))
        self.network.dropout = Dropout(settings.dropout, self._generator)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, max_lr=settings.learning_rate, total_steps=settings.num_batches
        )
        self._replay = PrioritizedReplay(
            settings.capacity, num_annealed=settings.num_batches * settings.batch_size, rng_seed=settings.rng_seed
        )
        self._replay.add(np.arange(len(train)))
        self.num_batches = 0
        self._kept: dict[str, Tensor] = copy.deepcopy(self.network.state_dict())
        self._validation_reward = torch.from_numpy(self._validation.reward) / self._scale
        self._best_losses = self.validation_losses()
        self._kept_loss, self._kept_at, self._num_worse = float(self._best_losses.mean()), 0, 0
        self.baseline_loss = float(_huber(self._validation_reward).mean())

    @property
    def is_done(self) -> bool:
        """Whether all batches were learnt from, or the validation loss stays clearly worse than it was."""
        return self.num_batches >= self._settings.num_batches or self._num_worse >= self._settings.patience

    def step(self) -> Curve:
        """Learn from one batch."""
        with _deterministic(self._settings.threads):
            loss = self._learn()
            self.num_batches += 1
            is_look = (
                self.num_batches % self._settings.eval_every == 0 or self.num_batches == self._settings.num_batches
            )
            validation_loss = self._look() if is_look else None
        rate = float(self._optimizer.param_groups[0]["lr"])
        return Curve(self.num_batches, self._settings.num_batches, rate, loss, validation_loss)

    def fit(self, progress: Callable[[Curve], None] = lambda _curve: None) -> TrainedNetwork:
        """Learn to the end, and give the network that is kept."""
        while not self.is_done:
            progress(self.step())
        return self.trained()

    def trained(self) -> TrainedNetwork:
        """The network that is kept so far."""
        kept = PolicyNetwork(self.network.shape)
        kept.load_state_dict(self._kept)
        with _deterministic(self._settings.threads):
            kept.calibration.fill_(self._slope(kept))
        return TrainedNetwork(kept.eval(), self.blueprints, self._kept_loss, self.baseline_loss, self._kept_at)

    @torch.no_grad()
    def validation_losses(self) -> NDArray[np.float64]:
        """Huber loss of what was chosen in the validation runs, (N,), in units of the reward's scale."""
        gain = self._validation_gains(self._averaged.module)
        return _huber(gain - self._validation_reward).double().numpy()

    @torch.no_grad()
    def _slope(self, network: nn.Module) -> float:
        """Of reward over gain on the validation runs, through 0 as WAIT is, and a standard error over runs more."""
        gain, reward = self._validation_gains(network).double().numpy(), self._validation_reward.double().numpy()
        squares = max(MIN_SCALE, float((gain**2).sum()))
        slope = float((gain * reward).sum()) / squares
        return float(np.clip(slope + self._error_of_sum(gain * (reward - slope * gain)) / squares, 0.0, 1.0))

    def _validation_gains(self, network: nn.Module) -> Tensor:
        gains, size = list[Tensor](), self._settings.mini_batch_size
        for start in range(0, len(self._validation.reward), size):
            which = np.arange(start, min(start + size, len(self._validation.reward)))
            gains.append(self._predict(network, self._validation, which, hide=False)[0])
        return torch.cat(gains)

    def _look(self) -> float:
        """The validation loss; today's weights are kept unless it is worse."""
        losses = self.validation_losses()
        loss, is_kept = float(losses.mean()), not self._is_worse(losses)
        self._num_worse = 0 if is_kept else self._num_worse + 1
        if is_kept:
            self._kept_loss, self._kept_at = loss, self.num_batches
            self._kept = copy.deepcopy(self._averaged.module.state_dict())
        if loss < self._best_losses.mean():
            self._best_losses = losses
        return loss

    def _is_worse(self, losses: NDArray[np.float64]) -> bool:
        """Whether losses are above the best ones by more than a standard error."""
        more = losses - self._best_losses
        return bool(more.sum() > self._error_of_sum(more - more.mean()))

    def _error_of_sum(self, rows: NDArray[np.float64]) -> float:
        """Standard error of the sum over validation rows whose mean is 0; those of one run are not independent."""
        by_run = np.bincount(self._validation.run, weights=rows)
        return float(np.sqrt((by_run**2).sum()))

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of training depends on, besides the experiences and the settings."""
        return {
            "network": self.network.state_dict(),
            "averaged": self._averaged.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "replay": self._replay.state_dict(),
            "generator": self._generator.get_state(),
            "kept": self._kept,
            "best_losses": torch.from_numpy(self._best_losses),
            "numbers": (self.num_batches, self._kept_loss, self._kept_at, self._num_worse),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.network.load_state_dict(state["network"])
        self._averaged.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._replay.load_state_dict(state["replay"])
        self._generator.set_state(state["generator"])
        self._kept, self._best_losses = dict(state["kept"]), state["best_losses"].numpy()
        self.num_batches, self._kept_loss, self._kept_at, self._num_worse = state["numbers"]

    def _learn(self) -> float:
        settings = self._settings
        drawn = self._replay.draw(settings.batch_size)
        errors, total = [], 0.0
        self._optimizer.zero_grad()
        for start in range(0, settings.batch_size, settings.mini_batch_size):
            part = slice(start, start + settings.mini_batch_size)
            gain, value, reward = self._predict(self.network, self._train, drawn.items[part], hide=True)
            weights = torch.from_numpy(drawn.weights[part].astype(np.float32))
            loss = (weights * (_huber(gain - reward) + settings.value_loss_weight * _huber(value - reward))).sum()
            (loss / settings.batch_size).backward()  # type: ignore[no-untyped-call]
            errors.append((gain - reward).detach().abs().numpy())
            total += loss.item()
        nn.utils.clip_grad_norm_(self.network.parameters(), settings.max_gradient_norm)
        self._optimizer.step()
        self._schedule.step()
        self._averaged.update_parameters(self.network)
        self._replay.update(drawn.slots, np.concatenate(errors))
        return total / settings.batch_size

    def _predict(
        self, network: nn.Module, rows: _Rows, which: NDArray[np.int64], *, hide: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gain of what was chosen, value and reward of some rows, (N,) each, in units of the reward's scale.

        ``hide``: some blueprints go by no name, so that the network learns what to think of one that it does not know.
        """
        batch = GraphBatch.of([rows.arrays[n] for n in which], self.blueprints.numbers)
        if hide:
            hidden = (
                torch.rand(len(batch.blueprint), generator=self._generator) < self._settings.anonymous_blueprint_share
            )
            batch.blueprint.masked_fill_(hidden, UNKNOWN_BLUEPRINT)
        scores = network(batch)
        return scores.gain / self._scale, scores.value / self._scale, torch.from_numpy(rows.reward[which]) / self._scale

    def _rows(self, experiences: Sequence[Experience]) -> _Rows:
        arrays, is_wait, reward = [], [], []
        _names, run = np.unique([one.run_id for one in experiences], return_inverse=True)
        for one in experiences:
            chosen = SingleChoice(legal_choices(one.view), one.chosen)
            arrays.append(read_view(one.view, self._settings.metric, chosen))
            is_wait.append(one.chosen == 0)
            reward.append(one.reward)
        return _Rows(arrays, np.array(is_wait), np.array(reward, dtype=np.float32), run)

    def _scale_to(self, rows: _Rows) -> None:
        """Inputs and reward in units of the training set's own spread."""
        levels = {Level.RUN: "run", Level.LAYER: "layers", Level.SEED: "seeds", Level.KERNEL: "kernels"}
        arrays = {
            level: torch.from_numpy(np.concatenate([getattr(one, name) for one in rows.arrays]))
            for level, name in levels.items()
        }
        self.network.fit_scales(arrays)
        told = rows.reward[~rows.is_wait]  # that of WAIT is 0 by definition
        self._scale = max(MIN_SCALE, float(np.sqrt(np.mean(told.astype(np.float64) ** 2)))) if len(told) else 1.0
        self.network.reward_scale.fill_(self._scale)


def _blueprints(experiences: Sequence[Experience]) -> tuple[str, ...]:
    return tuple(sorted({kernel.blueprint_id for one in experiences for kernel in one.view.kernels}))


def _huber(error: Tensor) -> Tensor:
    return nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")


def _moving(share: float) -> Any:
    """How a moving average takes in new weights; each update keeps ``share`` of it."""
    return get_ema_multi_avg_fn(share)  # type: ignore[no-untyped-call]


@contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    """Sums in one order, on so many threads."""
    before, was = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(was)
