"""Who decides: a policy under the name and version that its decisions give."""

from dataclasses import dataclass

from esper.services.tamiyo.policies import EpsilonSoft
from esper.streams.read_models.policy_versions import PolicyVersion


@dataclass(frozen=True, slots=True)
class ActivePolicy:
    """One version of a policy, as it acts. A batch of decisions is made by one of these."""

    of: PolicyVersion
    policy: EpsilonSoft

    @property
    def policy_id(self) -> str:
        """The name that its decisions give."""
        return self.of.policy_id

    @property
    def version(self) -> int:
        """The version that they give."""
        return self.of.version
