"""Redis as others run it: a job goes its whole way with a password, by a Unix socket, in a numbered database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.workers.process import fork_safety
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.platforms import FOREIGN, Platform
from tests.fixtures.servers.given import numbered
from tests.fixtures.servers.pair import empty_database, environment_of
from tests.fixtures.servers.redises import redis_server
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
#: Password of all the characters that an address must quote.
PASSWORD = "p/w@:;?#%&+ é"
QUOTED = quote(PASSWORD, safe="")


@pytest.fixture(autouse=True)
def _nothing_of_the_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)


@pytest.fixture
def own_redis_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a server of the kind that the test asks for."""
    folder = tmp_path_factory.mktemp("r")
    with ExitStack() as stack:
        if request.param == "password":
            server = stack.enter_context(redis_server(folder, password=PASSWORD))
            yield f"redis://:{QUOTED}@127.0.0.1:{server.port}/0"
        elif request.param == "user":
            server = stack.enter_context(redis_server(folder, password="another"))
            rules: tuple[str, ...] = ("on", f">{PASSWORD}", "~*", "&*", "+@all")
            command: Any = server.client.execute_command
            command("ACL", "SETUSER", "me+you", *rules)
            yield f"redis://me%2Byou:{QUOTED}@127.0.0.1:{server.port}/0"
        else:
            stack.enter_context(redis_server(folder, password=PASSWORD, path=folder / "r.sock"))
            yield f"unix://:{QUOTED}@{folder}/r.sock?db=5"


each_kind = pytest.mark.parametrize("own_redis_url", ["password", "user", "socket"], indirect=True)


@each_kind
def test_a_job_runs(own_redis_url: str, database_url: str, tmp_path: Path) -> None:
    """The job runs in a pool of processes, and uses the ledger, the broker and the results."""
    with platform_on(environment_of(own_redis_url, database_url, tmp_path), tmp_path) as running:
        submitter = Submitter(running)
        running.worker("a", cpus=2)
        job = submitter.send(ADD, 40, 2)
        assert submitter.value(job) == 42
        assert submitter.ended(job).state == "succeeded"
        assert submitter.view("a")["cpus"] == "2"
        shown = running.celery("cluster", "--json")
        assert shown.returncode == 0, shown.stderr
        assert PASSWORD not in shown.stdout + shown.stderr
        assert QUOTED not in shown.stdout + shown.stderr
        submitter.close()


@each_kind
def test_a_child_has_no_connection_of_its_parent(own_redis_url: str, database_url: str, tmp_path: Path) -> None:
    with platform_on(environment_of(own_redis_url, database_url, tmp_path), tmp_path) as running:
        stores = Stores(lambda _: running.settings)
        stores.redis.ping()
        ours = stores.ledger.descriptors()
        assert len(ours) == 1
        assert set(ours) <= set(fork_safety.sockets_to(fork_safety.endpoints_of(running.settings)))
        stores.redis.close()


def books_are_right(running: Platform) -> bool:
    return verify.check(running.engine, running.redis).holds


def test_two_platforms_in_databases_of_one_redis_stay_apart(
    tmp_path: Path, own_embedded_url: str, server_pair: Pair
) -> None:
    """Both platforms use one worker name and one job id."""
    with ExitStack() as stack:
        both = []
        for number in (3, 4):
            folder = tmp_path / str(number)
            folder.mkdir()
            environment = environment_of(
                numbered(own_embedded_url, number), stack.enter_context(empty_database(server_pair)), folder
            )
            running = stack.enter_context(platform_on(environment, folder))
            submitter = Submitter(running)
            stack.callback(submitter.close)
            both.append((running, submitter, running.worker("a", cpus=number, pool="threads")))
        for number, (_, submitter, _) in enumerate(both):
            submitter.send(ADD, 40, number, task_id="same")
        assert [submitter.value("same") for _, submitter, _ in both] == [40, 41]
        assert [submitter.view("a")["cpus"] for _, submitter, _ in both] == ["3", "4"]
        assert [submitter.jobs() for _, submitter, _ in both] == [1, 1]
        assert all(worker.alive for *_, worker in both)
        until(lambda: all(map(books_are_right, [running for running, *_ in both])), "the books are right")
        with connect(numbered(own_embedded_url, 0)) as client:
            assert client.dbsize() == 0


@pytest.fixture
def own_embedded_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("r")) as server:
        yield f"redis://127.0.0.1:{server.port}/0"
