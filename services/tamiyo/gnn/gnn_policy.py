"""GnnPolicy: the network as a policy. It prefers the choice with the highest expected gain."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from esper.errors import ConfigError
from esper.graph.graph_view import GraphView
from esper.logging import get_logger
from esper.schemas.enums import Action
from esper.services.tamiyo.control.legal_choices import Choice, LegalChoices
from esper.services.tamiyo.gnn.graph_batch import GraphBatch
from esper.services.tamiyo.gnn.network import PolicyNetwork
from esper.services.tamiyo.gnn.pooling import find_scatter
from esper.services.tamiyo.gnn.settings import NetworkSettings
from esper.services.tamiyo.gnn.view_arrays import read_view
from esper.services.tamiyo.policies import ActionDistribution, Policy

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BlueprintVocabulary:
    """The blueprints that a network was trained on, with codes from 1; every other blueprint has code 0."""

    names: tuple[str, ...] = ()
    codes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", {name: n for n, name in enumerate(self.names, 1)})


class GnnPolicy(Policy):
    """Samples choices by softmax(gain / temperature + prior). Pure: equal views give equal distributions.

    Args:
        temperature: in units of the reward; the advantage that makes a choice e times as likely.
        metric: the metric whose history the network reads.
    """

    kind = "gnn"

    def __init__(
        self,
        network: PolicyNetwork,
        blueprints: BlueprintVocabulary,
        *,
        metric: str = "val_accuracy",
        temperature: float,
        options: NetworkSettings | None = None,
    ) -> None:
        options = options or NetworkSettings.model_validate({})
        self._device = _device(options.device)
        self.network = network.to(self._device).eval()
        self.network.use_scatter(*find_scatter(options.scatter))
        self._blueprints, self._metric, self._temperature = blueprints, metric, temperature
        self._autocast = options.autocast and self._device.type == "cuda"
        if options.compile_encoders == "on" or (options.compile_encoders == "auto" and self._device.type == "cuda"):
            for encoder in self.network.encoders.values():
                encoder.compile(dynamic=True)
        _log.info("policy.accelerated", **self.acceleration_status)

    @property
    def acceleration_status(self) -> dict[str, str | bool]:
        """Scatter library, device, precision and threads."""
        return {
            "scatter": self.network.scatter_name,
            "device": str(self._device),
            "autocast": self._autocast,
            "threads": str(torch.get_num_threads()),
        }

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """Return the distribution over all choices of one view."""
        return self.distributions([view], [choices])[0]

    def distributions(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]]
    ) -> Sequence[ActionDistribution]:
        """Return the distribution of each view, in one forward pass."""
        found = []
        for (gain, value), choices in zip(self.gains(views, choices_per_view), choices_per_view, strict=True):
            probabilities = softmax(gain / self._temperature + prior(len(gain)))
            found.append(ActionDistribution(probabilities, self._reason(gain, value, probabilities, choices)))
        return found

    @torch.inference_mode()
    def gains(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]] | None = None
    ) -> list[tuple[NDArray[np.float64], float]]:
        """Return for each view the expected gain of each legal choice, (C,), and the state value, in reward units.

        Args:
            choices_per_view: the ``legal_choices`` of the views, if already known.
        """
        batch = self._batch(views, choices_per_view)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            scores = self.network(batch)
        gain, value = scores.gain.double().cpu().numpy(), scores.value.tolist()
        ends = np.cumsum(batch.num_choices)[:-1]
        return list(zip(np.split(gain, ends), value, strict=True))

    def predict_rewards(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[Sequence[float]]:
        """Return the expected gain of each choice of each view, in units of the metric."""
        return [gain.tolist() for gain, _value in self.gains(views, choices_per_view)]

    def _batch(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]] | None = None
    ) -> GraphBatch:
        known = choices_per_view if choices_per_view is not None else [None] * len(views)
        arrays = [
            read_view(view, self._metric, choices if isinstance(choices, LegalChoices) else None)
            for view, choices in zip(views, known, strict=True)
        ]
        return GraphBatch.of(arrays, self._blueprints.codes).to(self._device)

    def _reason(
        self, gain: NDArray[np.float64], value: float, probabilities: NDArray[np.float64], choices: Sequence[Choice]
    ) -> str:
        best = int(gain.argmax())
        expected = f"highest expected gain: {_describe(choices[best])}, {self._metric} {gain[best]:+.4f} net of rent"
        alternative = "" if best == 0 else f" (wait {gain[0]:+.4f})"
        preferred = f"probability {probabilities[best]:.2f} among {len(choices)} choices"
        return f"{expected}{alternative}; {preferred}; state value {value:+.4f}"


def prior(num_choices: int) -> NDArray[np.float64]:
    """Return the logits, (C,), that give WAIT, the first choice, probability 1/2 if all gains are equal.

    Without them the probability of WAIT would vanish in a model with many seeds and kernels.
    """
    logits = np.zeros(num_choices)
    logits[1:] = -np.log(max(1, num_choices - 1))
    return logits


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return positive numbers that sum to 1."""
    exponentials = np.exp(values - values.max())
    found: NDArray[np.float64] = exponentials / exponentials.sum()
    return found


def _describe(choice: Choice) -> str:
    if choice.action is Action.WAIT or choice.seed is None:
        return "wait"
    kernel = f" with {choice.kernel.blueprint_id}" if choice.kernel else ""
    return f"{choice.action} {choice.seed.layer_id}:{choice.seed.seed_id}{kernel}"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        detail = str(error).splitlines()[0]
        raise ConfigError(f"tamiyo.network.device is '{name}', which torch cannot use ({detail}): use auto") from None
    return device
