"""Celery's own fixtures for tests, with this project's app instead of an empty one."""

import pytest
from celery.contrib.testing import tasks as _ping  # noqa: F401 - the task by which a worker is known to run
from tasks import app

pytest_plugins = ["celery.contrib.pytest"]


@pytest.fixture(scope="session")
def celery_session_app():
    """Return the parameters of `celery_session_worker`."""
    return app


@pytest.fixture
def celery_app():
    """Return the parameters of `celery_worker`."""
    return app
