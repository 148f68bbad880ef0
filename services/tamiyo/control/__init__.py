"""The control loop: from pending boundaries to views, decisions and commands in the log."""
