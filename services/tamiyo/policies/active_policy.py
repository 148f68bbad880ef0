"""The policy that makes the decisions, with the version that its decisions name."""

from typing import NamedTuple

from esper.services.tamiyo.policies import EpsilonSoft
from esper.streams.read_models.policy_versions import PolicyVersion


class ActivePolicy(NamedTuple):
    """One version of a policy, made epsilon-soft. Every decision of a batch is made by the same one."""

    version: PolicyVersion
    policy: EpsilonSoft
