"""The file of a policy: weights as safetensors, with a card that describes them. Its name is its SHA-256.

A file is checked before a tensor is made (size, card, inputs, names and shapes); nothing is ever unpickled. Equal
policies and cards give equal bytes.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from esper.errors import ContractError
from esper.graph.view_features import VIEW_VERSION
from esper.schemas.base import BlueprintId, FrozenContract, Scalar, Sha256, ShortName, Text
from esper.services.tamiyo.gnn.gnn_policy import BlueprintVocabulary, GnnPolicy
from esper.services.tamiyo.gnn.network import LEVELS, NetworkShape, PolicyNetwork
from esper.services.tamiyo.gnn.settings import NetworkSettings
from esper.services.tamiyo.gnn.view_arrays import input_names

MAX_POLICY_BYTES = 64 * 2**20
MAX_CARD_BYTES = 256 * 1024


class Training(FrozenContract):
    """The training data of a policy, and its results.

    Attributes:
        experiences_digest: names the experiences; equal experiences, settings and machines give equal weights.
        figures: results by name.
        limits: the range of hosts in the training data.
    """

    experiences_digest: Sha256 | None = None
    num_runs: Annotated[int, Field(ge=0)] = 0
    num_experiences: Annotated[int, Field(ge=0)] = 0
    data: Text = ""
    figures: dict[Text, Scalar] = Field(default_factory=dict)
    limits: Text = ""


class PolicyCard(FrozenContract):
    """The card in a policy's file."""

    format: Literal["esper-policy-1"] = "esper-policy-1"
    view_version: Annotated[int, Field(ge=1)] = VIEW_VERSION
    width: Annotated[int, Field(ge=1, le=1024)]
    rounds: Annotated[int, Field(ge=0, le=16)]
    blueprints: tuple[BlueprintId, ...]
    metric: ShortName
    temperature: Annotated[float, Field(gt=0)]
    inputs: dict[ShortName, tuple[Text, ...]]
    training: Training = Training()

    @property
    def shape(self) -> NetworkShape:
        """The shape of the network."""
        return NetworkShape(self.width, self.rounds, len(self.blueprints))


def make_card(shape: NetworkShape, blueprints: BlueprintVocabulary, metric: str, temperature: float) -> PolicyCard:
    """Return the card of a network, without its training data."""
    return PolicyCard(
        width=shape.width,
        rounds=shape.rounds,
        blueprints=blueprints.names,
        metric=metric,
        temperature=temperature,
        inputs={str(level): input_names(level) for level in LEVELS},
    )


def pack_policy(network: PolicyNetwork, card: PolicyCard) -> bytes:
    """Return the bytes of a policy's file.

    Raises:
        ContractError: the card belongs to another network, or is too large to be read again.
    """
    if card.shape != network.shape:
        raise ContractError(f"the card describes {card.shape}, the network is {network.shape}")
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in network.state_dict().items()}
    text, limit = json.dumps(card.model_dump(mode="json"), sort_keys=True), MAX_CARD_BYTES // 2
    if len(text.encode()) > limit:  # the header also holds the names of the tensors
        raise ContractError(f"the card has {len(text):,} bytes, the limit is {limit:,}: train with fewer blueprints")
    return save(weights, {"esper": text})


def read_card(data: bytes) -> PolicyCard:
    """Return the card of a policy's file.

    Raises:
        ContractError: it is no policy's file.
    """
    return _header(data)[0]


def load_policy(data: bytes, sha256: str | None = None, options: NetworkSettings | None = None) -> GnnPolicy:
    """Load a policy from the bytes of its file.

    Raises:
        ContractError: the bytes are too large, have another hash, are no policy, or this program cannot run the
            policy because it was trained on other inputs.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ContractError(f"the bytes are not those of policy {sha256[:12]}: fetch it again")
    card, shapes = _header(data)
    inputs = {str(level): input_names(level) for level in LEVELS}
    if card.inputs != inputs:
        other = sorted({n for level in LEVELS for n in set(card.inputs.get(level, ())) ^ set(inputs[level])})
        raise ContractError(f"the policy was trained on other inputs ({', '.join(other[:5])}): retrain it")
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in PolicyNetwork(card.shape).state_dict().items()}
    if shapes != expected:
        wrong = sorted({n for n in {*shapes, *expected} if shapes.get(n) != expected.get(n)})
        raise ContractError(f"the policy's weights do not fit its card: {', '.join(wrong[:5])}")
    try:
        weights = load(data)
    except (SafetensorError, ValueError) as error:
        raise ContractError(f"the policy's file is malformed: {error}") from error
    if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
        raise ContractError("the policy has weights that are not finite: retrain it")
    network = PolicyNetwork(card.shape)
    network.load_state_dict(weights)
    blueprints = BlueprintVocabulary(card.blueprints)
    return GnnPolicy(network, blueprints, metric=card.metric, temperature=card.temperature, options=options)


def _header(data: bytes) -> tuple[PolicyCard, dict[str, tuple[int, ...]]]:
    """Return the card, and the shape of each tensor."""
    size = int.from_bytes(data[:8], "little")
    if len(data) > MAX_POLICY_BYTES or not 0 < size <= min(MAX_CARD_BYTES, len(data) - 8):
        raise ContractError(f"no policy's file: {len(data)} bytes with a header of {size}")
    try:
        header: dict[str, Any] = json.loads(data[8 : 8 + size])
        card = PolicyCard.model_validate_json(header.pop("__metadata__")["esper"])
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        types = {entry["dtype"] for entry in header.values()}
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ContractError(f"no policy's file: {' '.join(str(error).split())[:200]}") from error
    if types != {"F32"}:
        raise ContractError(f"the policy has weights of type {', '.join(sorted(types))}, not F32")
    return card, shapes
