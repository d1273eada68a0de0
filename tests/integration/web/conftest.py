"""Fixtures of the tests of the page and its API."""

from __future__ import annotations

import pytest

from celery_capacity.routing.config.settings import Settings
from tests.fixtures.stores.authorities import LASTING
from tests.fixtures.stores.books import FOR_EVER


@pytest.fixture
def settings(platform_environment: dict[str, str]) -> Settings:
    """Return settings by which a worker that sends no heartbeat stays, however long a browser takes to start."""
    return Settings.from_environ({**platform_environment, **dict.fromkeys(LASTING, str(FOR_EVER))})
