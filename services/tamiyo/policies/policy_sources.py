"""Where policies come from: for each kind a source that makes one, from settings or from weights in S3.

The seam for a new kind: a function from a blob's bytes to a policy, in a ``WeightsSource``, under the kind's name in
``sources``.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from esper.config import Settings
from esper.errors import ConfigError, ContractError
from esper.schemas.base import Scalar
from esper.services.tamiyo.policies import Policy
from esper.services.tamiyo.policies.baselines import RandomPolicy, SchedulePolicy, WaitPolicy
from esper.services.tamiyo.policies.heuristic import HeuristicPolicy
from esper.services.tamiyo.settings import HeuristicSettings, TamiyoSettings
from esper.storage.blob_keys import BlobKind
from esper.storage.blobs import BlobStore
from esper.streams.read_models.policy_versions import PolicyVersion

DEFAULT_KIND = "heuristic"
"""Decides where the log names no policy yet: it needs no training."""

BASELINES = ("wait", "random", "schedule", "heuristic")
MAX_WEIGHTS_BYTES = 256 * 1024 * 1024
LOAD_S = 30.0  # without a byte from S3; then it is tried again later

Build = Callable[[bytes, PolicyVersion], Policy]
"""Makes a policy of verified bytes. Runs in a thread of its own."""


class PolicySource(Protocol):
    """Makes policies of one kind."""

    async def load(self, version: PolicyVersion) -> Policy:
        """The policy of this version, ready to act.

        Raises:
            Exception: it cannot be had; the message says why.
        """
        ...


class BaselineSource:
    """The policies that need no training. What a version's parameters do not say, the settings do."""

    def __init__(self, tamiyo: TamiyoSettings) -> None:
        self._tamiyo = tamiyo

    async def load(self, version: PolicyVersion) -> Policy:
        """The policy, with the thresholds that its activation named."""
        return baseline(version.kind, self._tamiyo, version.parameters)


class WeightsSource:
    """Policies that are made of a blob in S3."""

    def __init__(self, settings: Settings, build: Build) -> None:
        self._settings, self._build = settings, build

    async def load(self, version: PolicyVersion) -> Policy:
        """The policy that ``build`` makes of the blob that its training named.

        Raises:
            ContractError: the log names no weights, they are too large, missing or altered.
            UnavailableError, NotAllowedError: S3 does not give them.
            Exception: whatever ``build`` raises.
        """
        weights = version.weights
        if weights is None:
            raise ContractError(f"the log has no training of {version}: it names no weights")
        if weights.size_bytes > MAX_WEIGHTS_BYTES:
            raise ContractError(f"{version} has {weights.size_bytes:,} bytes of weights, {MAX_WEIGHTS_BYTES:,} at most")
        async with BlobStore(self._settings.need_s3()) as blobs:
            data = await blobs.get(
                weights.sha256, max_bytes=weights.size_bytes, kind=BlobKind.POLICY, deadline_s=LOAD_S
            )
        return await asyncio.to_thread(self._build, data, version)


def sources_by_kind(settings: Settings, tamiyo: TamiyoSettings) -> dict[str, PolicySource]:
    """Kind -> its source."""
    return {**dict.fromkeys(BASELINES, BaselineSource(tamiyo)), "gnn": WeightsSource(settings, partial(_gnn, tamiyo))}


def _gnn(tamiyo: TamiyoSettings, data: bytes, _version: PolicyVersion) -> Policy:
    import torch  # which no baseline needs

    from esper.services.tamiyo.gnn.policy_file import load_policy

    torch.set_num_threads(tamiyo.network.threads)  # of threads that compute for the first time after this
    return load_policy(data, options=tamiyo.network)


def make_policy(tamiyo: TamiyoSettings) -> Policy:
    """The policy that the settings name, or where they follow the log, that which decides before it names one."""
    return baseline(configured_version(tamiyo).kind, tamiyo, {})


def configured_version(tamiyo: TamiyoSettings) -> PolicyVersion:
    """The version that the settings name, as ``make_policy``."""
    kind = DEFAULT_KIND if tamiyo.policy == "active" else tamiyo.policy
    return PolicyVersion(kind, tamiyo.policy_version, kind, policy_parameters(kind, tamiyo))


def policy_parameters(kind: str, tamiyo: TamiyoSettings) -> dict[str, Scalar]:
    """What an activation of a baseline says of how it acts."""
    own: dict[str, Scalar] = {}
    if kind == "heuristic":
        own = tamiyo.heuristic.model_dump()
    elif kind == "schedule":
        own = {"every_epochs": tamiyo.schedule_every_epochs}
    elif kind == "random" and tamiyo.random_wait_probability is not None:
        own = {"wait_share": tamiyo.random_wait_probability}
    return {**own, "epsilon": tamiyo.epsilon}


def baseline(kind: str, tamiyo: TamiyoSettings, parameters: Mapping[str, Scalar]) -> Policy:
    """A baseline; ``parameters`` go before the settings.

    Raises:
        ConfigError: no baseline has this name.
    """
    match kind:
        case "wait":
            return WaitPolicy()
        case "random":
            share = parameters.get("wait_share", tamiyo.random_wait_probability)
            return RandomPolicy(None if share is None else float(share))
        case "schedule":
            return SchedulePolicy(int(parameters.get("every_epochs", tamiyo.schedule_every_epochs)))
        case "heuristic":
            known = {name: parameters[name] for name in HeuristicSettings.model_fields if name in parameters}
            return HeuristicPolicy(HeuristicSettings.model_validate({**tamiyo.heuristic.model_dump(), **known}))
    raise ConfigError(f"no policy of kind {kind!r} is known: one of {', '.join(BASELINES)}")
