"""Trains the network on experiences: a regression of rewards on views and choices.

The gain of the logged choice and the value of the state are fitted to its reward (Huber loss). Experiences are sampled
by priority (``dataset/replay_buffer.py``). Gradients are accumulated over the mini-batches of a batch, clipped and
applied; the learning rate follows one cycle (Smith & Topin 2018). An exponential moving average of the weights (Polyak
& Juditsky 1992) is evaluated and kept, because rewards are noisy. Every ``eval_every`` batches it is evaluated on the
validation runs. With few runs small differences are chance: the newest average is kept unless its loss exceeds the best
one by more than the standard error of the difference over runs (as Breiman et al. 1984 choose the size of a tree).
``patience`` consecutive worse evaluations end the training. Finally gains are multiplied by the slope of reward over
gain on the validation runs plus one standard error, clipped to 0..1, which removes clear overestimation.

Invariant: equal experiences, settings and machines give equal weights, to the bit, also if training was interrupted and
resumed from ``state_dict``.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esper.errors import ContractError
from esper.graph.view_features import Level
from esper.services.tamiyo.control.legal_choices import SingleChoice, legal_choices
from esper.services.tamiyo.dataset.experiences import Experience
from esper.services.tamiyo.dataset.replay_buffer import PrioritizedReplay
from esper.services.tamiyo.gnn.gnn_policy import BlueprintVocabulary
from esper.services.tamiyo.gnn.graph_batch import UNKNOWN_BLUEPRINT, GraphBatch
from esper.services.tamiyo.gnn.network import Dropout, NetworkShape, PolicyNetwork
from esper.services.tamiyo.gnn.settings import TrainingSettings
from esper.services.tamiyo.gnn.view_arrays import ViewArrays, read_view

MIN_SCALE = 1e-6
"""Lower bound of the reward's scale; smaller rewards are rounding errors."""


class TrainingStep(NamedTuple):
    """The state of training after a batch. Losses are Huber losses in units of the reward's scale."""

    batch: int
    num_batches: int
    learning_rate: float
    train_loss: float
    validation_loss: float | None


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network and its blueprints.

    Attributes:
        validation_loss: of the kept weights, before gains are calibrated.
        baseline_loss: the loss of a network that expects no gain of any choice.
        num_batches: number of batches that the kept weights were trained on.
    """

    network: PolicyNetwork
    blueprints: BlueprintVocabulary
    validation_loss: float
    baseline_loss: float
    num_batches: int


class _Rows(NamedTuple):
    """Experiences as arrays: each view with its logged choice alone."""

    arrays: Sequence[ViewArrays]
    is_wait: NDArray[np.bool_]
    reward: NDArray[np.float32]
    run: NDArray[np.int64]


class NetworkTrainer:
    """Trains one network. ``step`` trains on one batch, ``trained`` returns the result.

    Args:
        validation: experiences of other runs than ``train``.

    Raises:
        ContractError: there are no experiences to train on, or none to validate on.
    """

    def __init__(
        self, train: Sequence[Experience], validation: Sequence[Experience], settings: TrainingSettings
    ) -> None:
        self._settings = settings
        if not train or not validation:
            raise ContractError(
                f"{len(train)} experiences to train on, {len(validation)} to validate on: replay more runs"
            )
        self.blueprints = BlueprintVocabulary(_blueprints(train))
        self._train, self._validation = self._rows(train), self._rows(validation)
        self._generator = torch.Generator().manual_seed(settings.rng_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.rng_seed)
            shape = NetworkShape(settings.width, settings.rounds, len(self.blueprints.names))
            self.network = PolicyNetwork(shape)
        self._set_scales(self._train)
        average = get_ema_multi_avg_fn(settings.weight_average_decay)  # type: ignore[no-untyped-call]
        self._averaged = AveragedModel(self.network, multi_avg_fn=average)
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
        """Whether all batches are done, or the validation loss stays clearly worse than the best one."""
        return self.num_batches >= self._settings.num_batches or self._num_worse >= self._settings.patience

    def step(self) -> TrainingStep:
        """Train on one batch."""
        with _deterministic(self._settings.threads):
            loss = self._train_batch()
            self.num_batches += 1
            is_last = self.num_batches == self._settings.num_batches
            is_evaluated = is_last or self.num_batches % self._settings.eval_every == 0
            validation_loss = self._evaluate() if is_evaluated else None
        rate = float(self._optimizer.param_groups[0]["lr"])
        return TrainingStep(self.num_batches, self._settings.num_batches, rate, loss, validation_loss)

    def trained(self) -> TrainedNetwork:
        """Return the kept network, calibrated."""
        kept = PolicyNetwork(self.network.shape)
        kept.load_state_dict(self._kept)
        with _deterministic(self._settings.threads):
            kept.calibration.fill_(self._slope(kept))
        return TrainedNetwork(kept.eval(), self.blueprints, self._kept_loss, self.baseline_loss, self._kept_at)

    @torch.no_grad()
    def validation_losses(self) -> NDArray[np.float64]:
        """Return the loss of each validation experience, (N,), in units of the reward's scale."""
        gain = self._validation_gains(self._averaged.module)
        return _huber(gain - self._validation_reward).double().numpy()

    @torch.no_grad()
    def _slope(self, network: nn.Module) -> float:
        """Return the slope of reward over gain on the validation runs, without intercept, plus one standard error."""
        gain, reward = self._validation_gains(network).double().numpy(), self._validation_reward.double().numpy()
        squares = max(MIN_SCALE, float((gain**2).sum()))
        slope = float((gain * reward).sum()) / squares
        return float(np.clip(slope + self._error_of_sum(gain * (reward - slope * gain)) / squares, 0.0, 1.0))

    def _validation_gains(self, network: nn.Module) -> Tensor:
        gains, size = list[Tensor](), self._settings.mini_batch_size
        for start in range(0, len(self._validation.reward), size):
            which = np.arange(start, min(start + size, len(self._validation.reward)))
            gains.append(self._predict(network, self._validation, which, hide_blueprints=False)[0])
        return torch.cat(gains)

    def _evaluate(self) -> float:
        """Return the validation loss; keep the current average unless it is worse."""
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
        """Return whether losses exceed the best ones by more than a standard error."""
        excess = losses - self._best_losses
        return bool(excess.sum() > self._error_of_sum(excess - excess.mean()))

    def _error_of_sum(self, rows: NDArray[np.float64]) -> float:
        """Return the standard error of the sum of validation rows with mean 0. Rows of one run are not independent."""
        by_run = np.bincount(self._validation.run, weights=rows)
        return float(np.sqrt((by_run**2).sum()))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that further training depends on, except experiences and settings."""
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
        """Restore what ``state_dict`` returned."""
        self.network.load_state_dict(state["network"])
        self._averaged.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._replay.load_state_dict(state["replay"])
        self._generator.set_state(state["generator"])
        self._kept, self._best_losses = dict(state["kept"]), state["best_losses"].numpy()
        self.num_batches, self._kept_loss, self._kept_at, self._num_worse = state["numbers"]

    def _train_batch(self) -> float:
        settings = self._settings
        sample = self._replay.draw(settings.batch_size)
        errors, total = [], 0.0
        self._optimizer.zero_grad()
        for start in range(0, settings.batch_size, settings.mini_batch_size):
            part = slice(start, start + settings.mini_batch_size)
            gain, value, reward = self._predict(self.network, self._train, sample.items[part], hide_blueprints=True)
            weights = torch.from_numpy(sample.weights[part].astype(np.float32))
            loss = (weights * (_huber(gain - reward) + settings.value_loss_weight * _huber(value - reward))).sum()
            (loss / settings.batch_size).backward()  # type: ignore[no-untyped-call]
            errors.append((gain - reward).detach().abs().numpy())
            total += loss.item()
        nn.utils.clip_grad_norm_(self.network.parameters(), settings.max_gradient_norm)
        self._optimizer.step()
        self._schedule.step()
        self._averaged.update_parameters(self.network)
        self._replay.update(sample.slots, np.concatenate(errors))
        return total / settings.batch_size

    def _predict(
        self, network: nn.Module, rows: _Rows, which: NDArray[np.int64], *, hide_blueprints: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gain, value and reward of some rows, (N,) each, in units of the reward's scale.

        Args:
            hide_blueprints: replace a share of the blueprints by the unknown one, so that the network learns it too.
        """
        batch = GraphBatch.of([rows.arrays[n] for n in which], self.blueprints.codes)
        if hide_blueprints:
            draws = torch.rand(len(batch.blueprint), generator=self._generator)
            batch.blueprint.masked_fill_(draws < self._settings.anonymous_blueprint_share, UNKNOWN_BLUEPRINT)
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

    def _set_scales(self, rows: _Rows) -> None:
        """Set the scales of inputs and reward from the training set."""
        levels = {Level.RUN: "run", Level.LAYER: "layers", Level.SEED: "seeds", Level.KERNEL: "kernels"}
        arrays = {
            level: torch.from_numpy(np.concatenate([getattr(one, name) for one in rows.arrays]))
            for level, name in levels.items()
        }
        self.network.fit_scales(arrays)
        rewards = rows.reward[~rows.is_wait].astype(np.float64)  # the reward of WAIT is 0 by definition
        self._scale = max(MIN_SCALE, float(np.sqrt(np.mean(rewards**2)))) if len(rewards) else 1.0
        self.network.reward_scale.fill_(self._scale)


def _blueprints(experiences: Sequence[Experience]) -> tuple[str, ...]:
    return tuple(sorted({kernel.blueprint_id for one in experiences for kernel in one.view.kernels}))


def _huber(error: Tensor) -> Tensor:
    return nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")


@contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    """Use deterministic algorithms and a fixed number of threads."""
    num_threads, was_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(was_deterministic)
