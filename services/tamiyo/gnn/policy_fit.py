"""``fit``: trains a policy on experiences and writes its file. A fit can be resumed and can write TensorBoard curves.

Implements ``FitFunction`` of ``esper.services.tamiyo.versions.retraining``. A share of the training runs serves early
stopping. Runs that the command holds out never get here.
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
from esper.services.tamiyo.gnn.network_trainer import NetworkTrainer, TrainedNetwork, TrainingStep
from esper.services.tamiyo.gnn.policy_file import Training, make_card, pack_policy
from esper.services.tamiyo.gnn.pooling import find_scatter
from esper.services.tamiyo.gnn.settings import NetworkSettings, TrainingSettings
from esper.services.tamiyo.gnn.view_arrays import input_names
from esper.services.tamiyo.settings import TamiyoSettings
from esper.services.tamiyo.versions.retraining import FitProgress, FitSettings, Split, split_by_run

POLICY_FILE, CARD_FILE, STATE_FILE = "policy.safetensors", "card.json", "training.pt"
STATE_FORMAT = 1
STOPPING_SHARE = 0.2
"""Share of the training runs that serve early stopping."""


class FittedPolicy:
    """A trained policy, its predictions, and its file."""

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
        """Return the expected gain of each choice of each view, in units of the metric."""
        return self._gnn.predict_rewards(views, choices_per_view)

    def save(self, folder: Path, card: Mapping[str, Any]) -> None:
        """Write the policy's file, and a card with training and evaluation as a separate file."""
        training = Training(
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
        trained, settings = self.trained, self._settings
        file_card = make_card(trained.network.shape, trained.blueprints, settings.metric, settings.temperature)
        data = pack_policy(trained.network, file_card.model_copy(update={"training": training}))
        (folder / POLICY_FILE).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        whole = {"policy_sha256": sha256, "training": training.model_dump(mode="json"), **card}
        (folder / CARD_FILE).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fit(train: Experiences, settings: FitSettings, on_progress: Callable[[FitProgress], None]) -> FittedPolicy:
    """Train a policy with the hyperparameters of `tamiyo.training`.

    Raises:
        ConfigError: there are too few runs, or the state to resume from belongs to another training.
    """
    tamiyo = load_settings().section("tamiyo", TamiyoSettings)
    find_scatter(tamiyo.network.scatter)  # fails now rather than after training
    training = tamiyo.training.model_copy(update={"rng_seed": settings.rng_seed})
    _check_metric(train, training.metric)
    trainer = NetworkTrainer(*_split_for_stopping(train, settings.rng_seed + 1), training)
    with ExitStack() as stack:
        write_curves = _curve_writer(stack, settings.curves_to)
        inputs = json.dumps({str(level): input_names(level) for level in LEVELS})
        checkpoint = _Checkpoint(
            settings.resume_from, f"{STATE_FORMAT} {train.digest} {training.model_dump_json()} {inputs}"
        )
        checkpoint.restore(trainer)
        while not trainer.is_done:
            step = trainer.step()
            write_curves(step)
            on_progress(_progress(step))
            if step.validation_loss is not None:
                checkpoint.save(trainer)
    return FittedPolicy(trainer.trained(), training, tamiyo.network, train)


def _split_for_stopping(train: Experiences, rng_seed: int) -> Split:
    try:
        return split_by_run(train, STOPPING_SHARE, rng_seed)
    except ConfigError:
        raise ConfigError(
            f"{len(train.runs)} training runs are too few: some of them serve early stopping; replay more runs"
        ) from None


def _check_metric(train: Experiences, metric: str) -> None:
    known = set[str]()
    for one in train:
        known.update(*(epoch.metrics for epoch in one.view.epochs))
        if metric in known:
            return
    raise ConfigError(
        f"tamiyo.training.metric is '{metric}', which no run has; choose one of {', '.join(sorted(known))}"
    )


def limits_of(experiences: Experiences) -> str:
    """Return the range of hosts that a policy was trained on; its card makes no claim about others."""
    sizes, layers, epochs = set[int](), set[int](), set[int]()
    for one in experiences:
        sizes.add(sum(layer.num_parameters for layer in one.view.layers))
        layers.add(len(one.view.layers))
        epochs.add(one.view.num_epochs)
    return (
        f"trained on hosts with {min(layers)} to {max(layers)} layers and {min(sizes):,} to {max(sizes):,} parameters, "
        f"up to epoch {max(epochs)}; not tried on others"
    )


class _Checkpoint:
    """The state of an interrupted fit in a folder; ``identity`` says which fit it belongs to."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        self._path = None if folder is None else folder / STATE_FILE
        self._identity = hashlib.sha256(identity.encode()).hexdigest()

    def restore(self, trainer: NetworkTrainer) -> None:
        """Load the state into a trainer, if there is one."""
        if self._path is None or not self._path.exists():
            return
        try:
            saved = torch.load(self._path, weights_only=True)
            if saved["of_what"] == self._identity:
                trainer.load_state_dict(_with_arrays(saved["state"]))
                return
        except Exception as error:  # torch raises many types for a damaged file
            raise ConfigError(f"{self._path} is damaged: delete it to start again") from error
        raise ConfigError(
            f"{self._path} belongs to other experiences, settings or inputs: delete it, or name another folder"
        )

    def save(self, trainer: NetworkTrainer) -> None:
        """Replace the state atomically."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".new")
        torch.save({"of_what": self._identity, "state": _with_tensors(trainer.state_dict())}, partial)
        partial.replace(self._path)


def _with_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the replay buffer's arrays by tensors, which load with ``weights_only``."""
    replay = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in state["replay"].items()}
    return {**state, "replay": replay}


def _with_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    replay = {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in state["replay"].items()}
    return {**state, "replay": replay}


def _curve_writer(stack: ExitStack, folder: Path | None) -> Callable[[TrainingStep], None]:
    if folder is None:
        return lambda _step: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("curves need TensorBoard: pip install tensorboard, or omit --tensorboard") from error
    writer = stack.enter_context(SummaryWriter(str(folder)))

    def write(step: TrainingStep) -> None:
        for name, value in _progress(step).numbers.items():
            writer.add_scalar(name, value, step.batch)

    return write


def _progress(step: TrainingStep) -> FitProgress:
    numbers = {"loss": step.train_loss, "learning_rate": step.learning_rate}
    if step.validation_loss is not None:
        numbers["stopping_loss"] = step.validation_loss
    return FitProgress(step.batch, step.num_batches, numbers)
