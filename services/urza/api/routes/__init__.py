"""The routes of Urza's API, one module a resource."""
