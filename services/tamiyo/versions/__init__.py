"""Policy versions: retrained, published, activated, rolled back, and followed by the running service."""
