"""How good a policy is: rewards, off-policy evaluation, predicted outcomes, and the guard of the active version."""
