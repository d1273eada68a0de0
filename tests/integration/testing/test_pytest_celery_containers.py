"""The suite of test_pytest_celery.py on pytest-celery's Docker containers (`make test-docker`).

The containers are its Redis, a Postgres, and a worker in the image of this project.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any, Final

import pytest
from celery import Celery
from pytest_celery import DEFAULT_WORKER_VOLUME, CeleryTestBroker, RedisContainer, RedisTestBackend
from pytest_celery.vendors.worker import tasks
from pytest_docker_tools import container, fxtr
from pytest_docker_tools.wrappers import container as wrapped

from celery_capacity import migrations
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.app.install import create_app
from tests.fixtures.celery.nodes import PlatformContainer
from tests.fixtures.celery.smoke import Smoke
from tests.fixtures.processes.platforms import FOREIGN
from tests.fixtures.servers.docker_engine import built, image, in_container
from tests.fixtures.servers.pair import TENTH

pytestmark = [pytest.mark.docker, pytest.mark.long]

#: Password of a server that lives as long as a test.
PASSWORD: Final = "smoke"
#: Seconds until a container is ready.
STARTING: Final = 120

postgres_server = container(
    image="{postgres_image.id}",
    environment={"POSTGRES_PASSWORD": PASSWORD},
    network="{default_pytest_celery_network.name}",
    ports={"5432/tcp": None},
    # The engine would make a volume without a name for each container, and nobody would remove it.
    tmpfs={"/var/lib/postgresql": ""},
    timeout=STARTING,
)
default_redis_broker = container(
    image="{redis_image.id}",
    ports=fxtr("default_redis_broker_ports"),
    environment=fxtr("default_redis_broker_env"),
    network="{default_pytest_celery_network.name}",
    wrapper_class=RedisContainer,
    tmpfs={"/data": ""},
    timeout=STARTING,
    command=fxtr("default_redis_broker_command"),
)
default_worker_container = container(
    image="{platform_image.id}",
    environment=fxtr("default_worker_env"),
    network="{default_pytest_celery_network.name}",
    volumes={"{default_worker_volume.name}": DEFAULT_WORKER_VOLUME},
    wrapper_class=PlatformContainer,
    timeout=STARTING,
    command=fxtr("default_worker_command"),
)


@pytest.fixture(scope="session")
def platform_image(docker_client: Any) -> Any:
    return built(docker_client, "celery-capacity:test")


@pytest.fixture(scope="session")
def postgres_image(docker_client: Any) -> Any:
    """Return the Postgres image of docker-compose.yml."""
    return image(docker_client, "postgres:18-alpine")


@pytest.fixture(scope="session")
def redis_image(docker_client: Any) -> Any:
    """Return the Redis image of docker-compose.yml."""
    return image(docker_client, "redis:8-alpine")


@pytest.fixture(autouse=True)
def published_ports(docker_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the plugin use published ports, unless these tests run in a container of the same engine."""
    monkeypatch.setattr(wrapped, "tests_inside_container", lambda: in_container(docker_client))


@pytest.fixture
def celery_broker(celery_redis_broker: CeleryTestBroker) -> CeleryTestBroker:
    """Return a single broker, instead of each that the plugin knows in turn."""
    return celery_redis_broker


@pytest.fixture
def celery_backend(celery_redis_backend: RedisTestBackend) -> RedisTestBackend:
    return celery_redis_backend


@pytest.fixture
def default_redis_backend(default_redis_broker: RedisContainer) -> RedisContainer:
    """Return the broker's server as result backend too, as the platform has it by default."""
    return default_redis_broker


@pytest.fixture
def settings(default_redis_broker: RedisContainer, postgres_server: Any) -> Settings:
    """Return the settings of the app in this process, after making the tables.

    The servers are named by the ports that they publish.
    """
    # An engine with IPv6 publishes the port twice, by equal numbers or not: the first is that of IPv4.
    port, *_ = postgres_server.ports["5432/tcp"]
    of_this_process = Settings.from_environ(
        {
            "REDIS_URL": default_redis_broker.celeryconfig["host_url"],
            "DATABASE_URL": f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres",
            **TENTH,
        }
    )
    migrations.upgrade(str(of_this_process.database_url))
    return of_this_process


@pytest.fixture
def celery_setup_app(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    app = create_app("smoke", resolve=lambda _: settings)
    yield app
    app.close()
    app.platform.engine.dispose()
    app.platform.redis.close()


@pytest.fixture
def default_worker_container_cls() -> type[PlatformContainer]:
    return PlatformContainer


@pytest.fixture
def default_worker_env(
    settings: Settings, celery_worker_cluster_config: dict[str, Any], postgres_server: Any
) -> dict[str, str]:
    """Return the environment of the worker, which names the servers as the containers' network does."""
    (redis_url,) = celery_worker_cluster_config["celery_broker_cluster_config"]["urls"]
    host = postgres_server.attrs["Config"]["Hostname"]
    return {
        **PlatformContainer.initial_env(celery_worker_cluster_config),
        **PlatformContainer.settings(),
        **TENTH,
        "REDIS_URL": redis_url,
        "DATABASE_URL": f"postgresql://postgres:{PASSWORD}@{host}:5432/postgres",
    }


@pytest.fixture
def default_worker_initial_content() -> dict[str, bytes]:
    """Return the contents of /app: the plugin's tasks, under the name that senders use. The app is in the image."""
    return {f"{tasks.__name__.replace('.', '/')}.py": inspect.getsource(tasks).encode()}


class TestOnContainers(Smoke):
    """The suite on Docker containers."""
