"""Studies: the same runs trained under several policies and compared."""
