"""Commands that train: `esper train` and `esper demo`."""
