"""GnnPolicy: the network behind the seam of all policies. It prefers what it expects to bring the most."""

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
class KnownBlueprints:
    """The blueprints that a network was trained on, numbered from 1; all others are 0 to it."""

    names: tuple[str, ...] = ()
    numbers: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", {name: n for n, name in enumerate(self.names, 1)})


class GnnPolicy(Policy):
    """Prefers choices by softmax(gain / temperature + prior). Pure: the same views give the same favourites.

    Args:
        temperature: in units of the reward; how much better a choice must look to be preferred e-fold.
        metric: the one whose course the network reads.
    """

    kind = "gnn"

    def __init__(
        self,
        network: PolicyNetwork,
        blueprints: KnownBlueprints,
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
        """What pools, where it computes, and in which precision."""
        return {
            "scatter": self.network.scatter_name,
            "device": str(self._device),
            "autocast": self._autocast,
            "threads": str(torch.get_num_threads()),
        }

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """The weights of all choices at one boundary."""
        return self.distributions([view], [choices])[0]

    def distributions(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]]
    ) -> Sequence[ActionDistribution]:
        """The same of several boundaries, in one pass."""
        found = []
        for (gain, value), offered in zip(self.gains(views, choices_per_view), choices_per_view, strict=True):
            weights = softmax(gain / self._temperature + prior(len(gain)))
            found.append(ActionDistribution(weights, self._reason(gain, value, weights, offered)))
        return found

    @torch.inference_mode()
    def gains(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]] | None = None
    ) -> list[tuple[NDArray[np.float64], float]]:
        """For each view the gain expected of each legal choice, (C,), in units of the reward, and the state's value.

        Args:
            choices_per_view: what ``legal_choices`` gives of the views, if it is at hand.
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
        """Of each view the gain of each choice, in units of the metric."""
        return [gain.tolist() for gain, _value in self.gains(views, choices_per_view)]

    def _batch(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]] | None = None
    ) -> GraphBatch:
        given = choices_per_view if choices_per_view is not None else [None] * len(views)
        arrays = [
            read_view(view, self._metric, choices if isinstance(choices, LegalChoices) else None)
            for view, choices in zip(views, given, strict=True)
        ]
        return GraphBatch.of(arrays, self._blueprints.numbers).to(self._device)

    def _reason(
        self, gain: NDArray[np.float64], value: float, weights: NDArray[np.float64], choices: Sequence[Choice]
    ) -> str:
        best = int(gain.argmax())
        told = f"{_named(choices[best])} looks best: {self._metric} {gain[best]:+.4f} net of rent"
        against = "" if best == 0 else f", waiting {gain[0]:+.4f}"
        return f"{told}{against}, weight {weights[best]:.2f} of {len(choices)} choices; the state's value {value:+.4f}"


def prior(num_choices: int) -> NDArray[np.float64]:
    """What is added to the first choice, WAIT, and to the others, so that who expects nothing waits half of the time.

    Without it a model of many seeds and kernels would hardly ever wait, whatever they promise.
    """
    logits = np.zeros(num_choices)
    logits[1:] = -np.log(max(1, num_choices - 1))
    return logits


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positive weights that sum to 1."""
    weights = np.exp(values - values.max())
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def _named(choice: Choice) -> str:
    if choice.action is Action.WAIT or choice.seed is None:
        return "waiting"
    with_kernel = f" with {choice.kernel.blueprint_id}" if choice.kernel else ""
    return f"to {choice.action} {choice.seed.layer_id}:{choice.seed.seed_id}{with_kernel}"


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without CUDA
        told = str(error).splitlines()[0]
        raise ConfigError(
            f"tamiyo.network.device is '{wanted}', where torch cannot compute ({told}): use auto"
        ) from None
    return device
