"""pytest for bench: rows on request, and what is known kept when a run is asked to end."""

from __future__ import annotations

import signal

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep", action="store_true", help="append figures to bench/results as they become known"
    )


def pytest_configure() -> None:
    """Let SIGTERM end a run as Ctrl-C does: pytest-benchmark then writes what it has."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
