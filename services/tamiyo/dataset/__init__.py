"""From the log to experiences: views, decisions and field reports, joined by causation, the same each time."""
