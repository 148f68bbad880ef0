"""Policy versions: retraining, publication, activation and rollback, and the follower of the active version."""
