"""One training run: data, hosts, loop, costs, and the trainer."""
