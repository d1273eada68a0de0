"""pytest-celery's own fixtures with processes of this machine as nodes: a platform worker passes as one of Celery's."""

from __future__ import annotations

import pytest
from celery import Celery
from pytest_celery import CeleryTestBroker, RedisTestBackend

from tests.fixtures.celery.nodes import PlatformContainer, RedisProcess, WorkerNode, WorkerProcess
from tests.fixtures.celery.smoke import Smoke
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform

pytestmark = pytest.mark.long


@pytest.fixture
def celery_broker(celery_redis_broker: CeleryTestBroker) -> CeleryTestBroker:
    """Return a single broker, instead of each that the plugin knows in turn."""
    return celery_redis_broker


@pytest.fixture
def celery_backend(celery_redis_backend: RedisTestBackend) -> RedisTestBackend:
    return celery_redis_backend


@pytest.fixture
def default_redis_broker(platform: Platform) -> RedisProcess:
    return RedisProcess(str(platform.settings.broker_url))


@pytest.fixture
def default_redis_backend(platform: Platform) -> RedisProcess:
    return RedisProcess(str(platform.settings.result_backend))


@pytest.fixture
def default_worker_cls() -> type[WorkerNode]:
    return WorkerNode


@pytest.fixture
def default_worker_container_cls() -> type[PlatformContainer]:
    return WorkerProcess


@pytest.fixture
def default_worker_container(
    platform: Platform, default_worker_command: list[str], default_worker_env: dict[str, str]
) -> WorkerProcess:
    # Only the plugin's variables for Celery are taken, since its paths are those of its image.
    urls = {name: value for name, value in default_worker_env.items() if name.startswith("CELERY_")}
    return WorkerProcess(platform, default_worker_command, urls)


@pytest.fixture
def celery_setup_app(submitter: Submitter) -> Celery:
    """Return the platform's app as the app that sends.

    The books are checked after each test, since `platform` is asked for.
    """
    return submitter.app


class TestOnProcesses(Smoke):
    """The suite on processes of this machine."""

    def test_the_nodes_are_those_of_this_test(self, celery_setup: object, platform: Platform) -> None:
        assert [process.name for process in platform.processes] == ["smoke"]
