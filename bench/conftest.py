"""pytest for bench: rows of what is measured, on request."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep", action="store_true", help="append figures to bench/results as they become known"
    )
