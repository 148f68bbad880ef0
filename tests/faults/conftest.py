"""Options of the fault suites."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--s3-operations", type=int, default=200, help="operations of the S3 storm")
