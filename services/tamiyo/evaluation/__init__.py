"""Policy evaluation: rewards, off-policy estimates, predicted outcomes, and automatic rollback."""
