"""Who decides: a policy under the name and version that its decisions give."""

from dataclasses import dataclass

from esper.services.tamiyo.policies import EpsilonSoft


@dataclass(frozen=True, slots=True)
class Acting:
    """One version of a policy, as it acts. A batch of decisions is made by one of these."""

    policy_id: str
    version: int
    policy: EpsilonSoft

    @property
    def kind(self) -> str:
        """The policy's kind."""
        return self.policy.policy.kind
