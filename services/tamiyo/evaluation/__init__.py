"""Policy evaluation: rewards, off-policy estimates, predicted outcomes, and the guard of the active version."""
