"""Tests of Urza's API. A package, so that its tests share a worker and two Urzas."""
