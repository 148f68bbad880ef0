"""Sources of policies: for each kind, a source that makes one from settings or from weights in S3.

A new kind needs a function that makes a policy from the bytes of a blob: pass it to a ``WeightsSource`` in
``sources_by_kind``.
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
"""Decides while the log names no active policy: it needs no training."""

BASELINES = ("wait", "random", "schedule", "heuristic")
MAX_WEIGHTS_BYTES = 256 * 1024 * 1024
LOAD_TIMEOUT_S = 30.0  # without a byte from S3; the follower then retries

Build = Callable[[bytes, PolicyVersion], Policy]
"""Makes a policy from verified bytes. Runs in a worker thread."""


class PolicySource(Protocol):
    """Makes policies of one kind."""

    async def load(self, version: PolicyVersion) -> Policy:
        """Return the policy of this version, ready to act.

        Raises:
            Exception: it cannot be loaded; the message says why.
        """
        ...


class BaselineSource:
    """Policies that need no training. Parameters of the version override the settings."""

    def __init__(self, tamiyo: TamiyoSettings) -> None:
        self._tamiyo = tamiyo

    async def load(self, version: PolicyVersion) -> Policy:
        """Return the policy, with the thresholds that its activation names."""
        return make_baseline(version.kind, self._tamiyo, version.parameters)


class WeightsSource:
    """Policies that are built from a blob in S3."""

    def __init__(self, settings: Settings, build: Build) -> None:
        self._settings, self._build = settings, build

    async def load(self, version: PolicyVersion) -> Policy:
        """Fetch the blob that the version's training names, and build the policy from it.

        Raises:
            ContractError: the log names no weights, or they are too large, missing or altered.
            UnavailableError, NotAllowedError: S3 is away or refuses.
            Exception: what ``build`` raises.
        """
        weights = version.weights
        if weights is None:
            raise ContractError(f"{version}: the log has no training of it, so its weights are unknown; publish it")
        if weights.size_bytes > MAX_WEIGHTS_BYTES:
            raise ContractError(
                f"{version}: weights have {weights.size_bytes:,} bytes, the limit is {MAX_WEIGHTS_BYTES:,}; "
                "publish a smaller network"
            )
        async with BlobStore(self._settings.need_s3()) as blobs:
            data = await blobs.get(
                weights.sha256, max_bytes=weights.size_bytes, kind=BlobKind.POLICY, deadline_s=LOAD_TIMEOUT_S
            )
        return await asyncio.to_thread(self._build, data, version)


def sources_by_kind(settings: Settings, tamiyo: TamiyoSettings) -> dict[str, PolicySource]:
    """Return the source of each kind of policy that Esper has."""
    gnn = WeightsSource(settings, partial(_build_gnn, tamiyo))
    return {**dict.fromkeys(BASELINES, BaselineSource(tamiyo)), "gnn": gnn}


def _build_gnn(tamiyo: TamiyoSettings, data: bytes, _version: PolicyVersion) -> Policy:
    import torch  # no baseline needs it

    from esper.services.tamiyo.gnn.policy_file import load_policy

    torch.set_num_threads(tamiyo.network.threads)  # affects threads that use torch for the first time after this
    return load_policy(data, options=tamiyo.network)


def make_policy(tamiyo: TamiyoSettings) -> Policy:
    """Make the policy of ``configured_version``."""
    return make_baseline(configured_version(tamiyo).kind, tamiyo, {})


def configured_version(tamiyo: TamiyoSettings) -> PolicyVersion:
    """Return the version that the settings name; if they follow the log, the default until the log names one."""
    kind = DEFAULT_KIND if tamiyo.policy == "active" else tamiyo.policy
    return PolicyVersion(kind, tamiyo.policy_version, kind, policy_parameters(kind, tamiyo))


def policy_parameters(kind: str, tamiyo: TamiyoSettings) -> dict[str, Scalar]:
    """Return the parameters that the activation of a baseline records."""
    parameters: dict[str, Scalar] = {}
    if kind == "heuristic":
        parameters = tamiyo.heuristic.model_dump()
    elif kind == "schedule":
        parameters = {"every_epochs": tamiyo.schedule_every_epochs}
    elif kind == "random" and tamiyo.random_wait_probability is not None:
        parameters = {"wait_share": tamiyo.random_wait_probability}
    return {**parameters, "epsilon": tamiyo.epsilon}


def make_baseline(kind: str, tamiyo: TamiyoSettings, parameters: Mapping[str, Scalar]) -> Policy:
    """Make a baseline; ``parameters`` override the settings.

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
    raise ConfigError(f"no policy of kind {kind!r} exists; choose one of {', '.join(BASELINES)}")
