"""Policies: the interface, the epsilon-soft behaviour policy, baselines, the heuristic, and policy sources."""

from esper.services.tamiyo.policies.policy import MIN_EPSILON as MIN_EPSILON
from esper.services.tamiyo.policies.policy import ActionDistribution as ActionDistribution
from esper.services.tamiyo.policies.policy import EpsilonSoft as EpsilonSoft
from esper.services.tamiyo.policies.policy import Policy as Policy
from esper.services.tamiyo.policies.policy import SampledChoice as SampledChoice
from esper.services.tamiyo.policies.policy import point_mass as point_mass
