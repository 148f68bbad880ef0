"""Urza's API: blueprints, kernels, runs, decisions and their causes, over HTTP.

Reads the projections and never writes them: a change goes through the log. docs/api/services.md is the guide.
"""

from esper.services.urza.api.app import make_api

__all__ = ["make_api"]
