"""Fixtures for all tests, and the order in which tests start."""

from __future__ import annotations

import pytest

import workers.plugin  # noqa: F401  makes `platform.servers` and the like importable

pytest_plugins = ["tests.fixtures.servers", "tests.fixtures.processes", "tests.fixtures.invariants"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: with several processes the short ones then fill what is left."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
