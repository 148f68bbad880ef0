"""``fit``: from experiences to a policy with its file; interrupted, it goes on; its curves can be watched.

The seam is ``esper.services.tamiyo.versions.retraining``'s. Of the runs to learn from a share is set aside to say
when to stop; what that command holds out is never seen here.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper.config import load_settings
from esper.errors import ConfigError
from esper.graph.graph_view import GraphView
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.dataset.experiences import Experiences
from esper.services.tamiyo.gnn.gnn_policy import GnnPolicy
from esper.services.tamiyo.gnn.network import LEVELS
from esper.services.tamiyo.gnn.policy_file import Training, make_card, pack_policy
from esper.services.tamiyo.gnn.policy_trainer import Curve, PolicyTrainer, TrainedNetwork
from esper.services.tamiyo.gnn.pooling import find_scatter
from esper.services.tamiyo.gnn.settings import NetworkSettings, TrainingSettings
from esper.services.tamiyo.gnn.view_arrays import input_names
from esper.services.tamiyo.settings import TamiyoSettings
from esper.services.tamiyo.versions.retraining import FitProgress, FitSettings, Split, split_by_run

POLICY_FILE, CARD_FILE, STATE_FILE = "policy.safetensors", "card.json", "training.pt"
STATE_FORMAT = 1
STOPPING_SHARE = 0.2
"""Of the runs to learn from, those that say when to stop."""


class FittedPolicy:
    """What a fit gives: a policy, what it expects, and its file."""

    def __init__(
        self, trained: TrainedNetwork, settings: TrainingSettings, network: NetworkSettings, experiences: Experiences
    ) -> None:
        self.trained, self._settings, self._experiences = trained, settings, experiences
        self._gnn = GnnPolicy(
            trained.network,
            trained.blueprints,
            metric=settings.metric,
            temperature=settings.temperature,
            options=network.model_copy(update={"device": "cpu"}),
        )
        self.policy = self._gnn

    def predict_rewards(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[Sequence[float]]:
        """Of each view the gain of each choice, in units of the metric."""
        return self._gnn.predict_rewards(views, choices_per_view)

    def save(self, folder: Path, card: Mapping[str, Any]) -> None:
        """Write the policy's file, and its card as a file of its own, with what it was judged on."""
        told = Training(
            experiences_digest=self._experiences.digest,
            num_runs=len(self._experiences.runs),
            num_experiences=len(self._experiences),
            figures={
                "loss": self.trained.validation_loss,
                "loss of expecting nothing": self.trained.baseline_loss,
                "batches": self.trained.num_batches,
            },
            limits=limits_of(self._experiences),
        )
        own = make_card(
            self.trained.network.shape, self.trained.blueprints, self._settings.metric, self._settings.temperature
        )
        data = pack_policy(self.trained.network, own.model_copy(update={"training": told}))
        (folder / POLICY_FILE).write_bytes(data)
        whole = {"policy_sha256": hashlib.sha256(data).hexdigest(), "training": told.model_dump(mode="json"), **card}
        (folder / CARD_FILE).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fit(train: Experiences, settings: FitSettings, progress: Callable[[FitProgress], None]) -> FittedPolicy:
    """Learn from experiences; the settings are those of `tamiyo.training`.

    Raises:
        ConfigError: there are too few runs, or the state to go on with is of another training.
    """
    tamiyo = load_settings().section("tamiyo", TamiyoSettings)
    find_scatter(tamiyo.network.scatter)  # refuses now what it would refuse after the work
    how = tamiyo.training.model_copy(update={"rng_seed": settings.rng_seed})
    _check_metric(train, how.metric)
    trainer = PolicyTrainer(*_split_to_stop(train, settings.rng_seed + 1), how)
    with ExitStack() as stack:
        write = _curves(stack, settings.curves_to)
        state = _State(settings.resume_from, f"{STATE_FORMAT} {train.digest} {how.model_dump_json()} {_inputs()}")
        state.load_into(trainer)
        while not trainer.is_done:
            curve = trainer.step()
            write(curve)
            progress(_told(curve))
            if curve.validation_loss is not None:
                state.keep(trainer)
    return FittedPolicy(trainer.trained(), how, tamiyo.network, train)


def _split_to_stop(train: Experiences, rng_seed: int) -> Split:
    try:
        return split_by_run(train, STOPPING_SHARE, rng_seed)
    except ConfigError:
        raise ConfigError(
            f"{len(train.runs)} runs to learn from are too few: some of them say when to stop; replay more runs"
        ) from None


def _check_metric(train: Experiences, metric: str) -> None:
    seen = set[str]()
    for one in train:
        seen.update(*(epoch.metrics for epoch in one.view.epochs))
        if metric in seen:
            return
    raise ConfigError(f"tamiyo.training.metric is '{metric}', which no run has: there are {', '.join(sorted(seen))}")


def _inputs() -> str:
    return json.dumps({str(level): input_names(level) for level in LEVELS})


def limits_of(experiences: Experiences) -> str:
    """Which hosts a policy learnt on: of any others its card says nothing."""
    sizes, layers, epochs = set[int](), set[int](), set[int]()
    for one in experiences:
        sizes.add(sum(layer.num_parameters for layer in one.view.layers))
        layers.add(len(one.view.layers))
        epochs.add(one.view.num_epochs)
    return (
        f"learnt on hosts of {min(layers)} to {max(layers)} layers and {min(sizes):,} to {max(sizes):,} parameters, "
        f"up to epoch {max(epochs)}; it was not tried on others"
    )


class _State:
    """Where an interrupted fit keeps what it needs to go on."""

    def __init__(self, folder: Path | None, of_what: str) -> None:
        self._path = None if folder is None else folder / STATE_FILE
        self._of_what = hashlib.sha256(of_what.encode()).hexdigest()

    def load_into(self, trainer: PolicyTrainer) -> None:
        """Go on from what is there, if anything."""
        if self._path is None or not self._path.exists():
            return
        try:
            saved = torch.load(self._path, weights_only=True)
            if saved["of_what"] == self._of_what:
                trainer.load_state_dict(_with_arrays(saved["state"]))
                return
        except Exception as error:  # whatever a damaged file makes torch raise
            raise ConfigError(f"{self._path} is damaged: delete it to begin again") from error
        raise ConfigError(
            f"{self._path} is of other experiences, settings or program: delete it, or name another folder"
        )

    def keep(self, trainer: PolicyTrainer) -> None:
        """Write the state; what was there stays until the new one is whole."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        torch.save({"of_what": self._of_what, "state": _with_tensors(trainer.state_dict())}, beside)
        beside.replace(self._path)


def _with_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """The replay's arrays as tensors: those load with ``weights_only``."""
    replay = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in state["replay"].items()}
    return {**state, "replay": replay}


def _with_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    replay = {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in state["replay"].items()}
    return {**state, "replay": replay}


def _curves(stack: ExitStack, folder: Path | None) -> Callable[[Curve], None]:
    if folder is None:
        return lambda _curve: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("curves need TensorBoard: pip install tensorboard, or leave --tensorboard away") from error
    writer = stack.enter_context(SummaryWriter(str(folder)))

    def write(curve: Curve) -> None:
        for name, value in _told(curve).numbers.items():
            writer.add_scalar(name, value, curve.batch)

    return write


def _told(curve: Curve) -> FitProgress:
    numbers = {"loss": curve.train_loss, "learning_rate": curve.learning_rate}
    if curve.validation_loss is not None:
        numbers["stopping_loss"] = curve.validation_loss
    return FitProgress(curve.batch, curve.num_batches, numbers)
