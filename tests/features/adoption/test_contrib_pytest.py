"""Testing with Celery: the fixtures of `celery.contrib.pytest`, `task_always_eager` and `apply`.

A project's own tests use them. They run in a pytest of their own, started here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery, chain

from celery_capacity import NoServers, Unsupported, install
from celery_capacity.workers.process.stores import platform_of
from tests.fixtures.documents.examples import move_into, python
from tests.fixtures.processes.platforms import Platform

#: A project's tests where Celery makes the app, and the project calls `install` on it.
CONFTEST = """
import pytest
from celery_capacity import install

pytest_plugins = ["celery.contrib.pytest"]

@pytest.fixture(scope="session")
def celery_includes():
    return ["tests.fixtures.tasks"]

@pytest.fixture
def celery_app(celery_app):
    return install(celery_app)

@pytest.fixture(scope="session")
def celery_session_app(celery_session_app):
    return install(celery_session_app)
"""

TESTS = """
import os
import pytest
from celery.contrib.testing.worker import start_worker
from celery.utils.nodenames import anon_nodename
from tests.fixtures.tasks import add
from celery_capacity import create_app

own = create_app("own")

@own.task(bind=True, cpus=2)
def attempt(self):
    return self.request.attempt

def test_defined_in_the_test(celery_app, celery_worker):
    @celery_app.task(cpus=0.5)
    def double(x):
        return 2 * x
    celery_worker.reload()
    assert double.delay(4).get(timeout=60) == 8
    assert celery_app.conf.broker_url == os.environ["REDIS_URL"]

@pytest.mark.celery(result_extended=True)
def test_with_settings_of_its_own(celery_app, celery_worker):
    result = add.delay(1, 2)
    assert result.get(timeout=60) == 3 and result.name == add.name
    # The worker of the first test had this name, and has left.
    assert celery_worker.hostname == anon_nodename()
    assert [*celery_app.control.ping(timeout=60, limit=1)[0]] == [anon_nodename()]

def test_one_of_all_tests_beside_one_of_this_test(celery_session_app, celery_session_worker, celery_app, celery_worker):
    assert celery_session_worker.hostname == anon_nodename() != celery_worker.hostname
    assert add.delay(2, 3).get(timeout=60) == 5

@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_pools(pool):
    with start_worker(own, pool=pool, concurrency=2):
        assert attempt.delay().get(timeout=60) == 1
"""

#: A project whose tests have its own app in both places, as docs/how-to/testing.md says.
ONE_APP = {
    "proj.py": """
import threading
from celery.contrib.testing import tasks
from celery_capacity import create_app
from celery_capacity.workers.process.stores import platform_of

app = create_app("proj")
both = threading.Barrier(2)

@app.task(cpus=1)
def add(x, y):
    return x + y

@app.task(cpus=4)
def meet():
    return both.wait(60)

def live():
    with platform_of(app).engine.connect() as connection:
        statement = "SELECT name FROM workers WHERE status NOT IN ('left', 'lost')"
        return [*connection.exec_driver_sql(statement).scalars()]
""",
    "conftest.py": """
import pytest
from proj import app

pytest_plugins = ["celery.contrib.pytest"]

@pytest.fixture
def celery_app():
    return app

@pytest.fixture(scope="session")
def celery_session_app():
    return app
""",
    "test_theirs.py": """
import pytest
from celery.contrib.testing.worker import start_worker
from proj import add, app, live, meet
from tests.fixtures.waiting import until
from celery_capacity.workers.broker.transport import receiving
from celery_capacity.workers.results.deliver_later import announcer_of

@pytest.mark.parametrize("order", [1, -1], ids=["first", "second"])
def test_each_ends_for_itself(order):
    with start_worker(app) as first, start_worker(app) as second:
        ends, stays = (first, second)[::order]
        until(lambda: app.control.ping([ends.hostname], limit=1), "an answer")
        app.control.shutdown(destination=[ends.hostname])
        until(lambda: live() == [stays.hostname.partition("@")[0]], live)
        assert add.delay(1, 2).get(timeout=60) == 3
        # What this process receives and says concerns the one that is left.
        runtime = stays.platform_runtime
        until(lambda: receiving.set_aside == runtime.quarantine.set_aside, lambda: receiving)
        assert announcer_of(app) is runtime.announcer
    assert live() == []

def test_one_that_is_terminated_from_another_thread_leaves():
    with start_worker(app) as worker:
        worker.terminate()
    assert live() == []

def test_one_of_all_tests(celery_session_worker):
    assert add.delay(1, 2).get(timeout=60) == 3

def test_one_of_all_tests_beside_one_of_this_test(celery_session_worker, celery_worker):
    assert {result.get(timeout=60) for result in [meet.delay(), meet.delay()]} == {0, 1}
    for worker in celery_session_worker, celery_worker:
        until(lambda: app.control.ping([worker.hostname], limit=1), worker.hostname)

def test_the_next_one(celery_worker):
    assert add.delay(1, 2).get(timeout=60) == 3
""",
}


def run_pytest(platform: Platform, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The plug-ins that are installed for this project's own tests would take half of the time.
    variables = {"PLATFORM_CPUS": "4", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return python(platform, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **variables)


def left(platform: Platform) -> tuple[list[str], list[str]]:
    """Return the workers that still count as live, and the states of all jobs."""
    with platform.engine.connect() as connection:
        live = connection.exec_driver_sql("SELECT name FROM workers WHERE status NOT IN ('left', 'lost')").scalars()
        states = connection.exec_driver_sql("SELECT DISTINCT state FROM jobs").scalars()
        return [*live], [*states]


@pytest.mark.long
def test_the_fixtures_of_celery_work_with_an_app_that_is_installed(platform: Platform) -> None:
    (platform.folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (platform.folder / "test_theirs.py").write_text(TESTS, encoding="utf-8")
    done = run_pytest(platform, "test_theirs.py")
    assert "5 passed" in done.stdout, done.stdout + done.stderr
    # Each worker left as a stopped worker does, and took nothing with it.
    assert left(platform) == ([], ["succeeded"])


@pytest.mark.long
def test_workers_of_one_app_in_one_process(platform: Platform) -> None:
    for name, text in ONE_APP.items():
        (platform.folder / name).write_text(text, encoding="utf-8")
    done = run_pytest(platform, "test_theirs.py")
    assert "6 passed" in done.stdout, done.stdout + done.stderr
    assert left(platform) == ([], ["succeeded"])


@pytest.mark.long
def test_the_example_tests_itself_with_the_projects_own_app(platform: Platform) -> None:
    move_into(platform, "plain", "tasks")
    done = run_pytest(platform)
    assert "6 passed" in done.stdout, done.stdout + done.stderr
    assert left(platform) == ([], ["succeeded"])


def test_the_example_submits_to_a_worker(platform: Platform) -> None:
    move_into(platform, "plain", "tasks")
    platform.worker("w", cpus=2, pool="threads")
    done = python(platform, "submit.py")
    assert done.stdout.strip() == "4 runs, 1450 in all", done.stderr
    with platform.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT name, request FROM jobs").all()
    assert sorted((row.name, row.request["cpus"]) for row in rows) == [
        ("tasks.report", 0.5),
        *(("tasks.simulate", cpus) for cpus in (1, 2, 2, 2)),
    ]


# -- without servers


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Celery]:
    """Yield an installed app where no servers are named or running."""
    for name in ("REDIS_URL", "DATABASE_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PLATFORM_HOME", str(tmp_path))
    app = install(Celery("nowhere", set_as_current=False))
    yield app
    app.close()


def test_what_is_called_in_this_process_needs_no_servers(nowhere: Celery) -> None:
    @nowhere.task(shared=False, cpus=8)
    def double(x: int) -> int:
        return 2 * x

    assert double.apply((4,), cpus=2).get() == 8
    assert chain(double.s(1), double.s().set(cpus=1)).apply().get() == 4
    nowhere.conf.task_always_eager = True
    result = double.apply_async((4,), cpus=2, memory="1GiB", priority=9)
    assert (result.get(), result.state) == (8, "SUCCESS")


def test_what_needs_servers_says_that_there_are_none(nowhere: Celery) -> None:
    with pytest.raises(NoServers, match="celery -A platform up"):
        nowhere.send_task("anything")
    with pytest.raises(NoServers):
        nowhere.connection_for_write()
    for _ in range(2):
        with pytest.raises(NoServers):
            nowhere.AsyncResult("id").get(timeout=1)


def test_results_are_read_once_servers_are_there(
    nowhere: Celery, platform_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoServers):
        nowhere.AsyncResult("id").get(timeout=1)
    for name, value in platform_environment.items():
        monkeypatch.setenv(name, value)
    assert nowhere.AsyncResult("id").state == "PENDING"
    assert nowhere.conf.broker_url == platform_environment["REDIS_URL"]
    platform_of(nowhere).redis.close()


def test_a_broker_in_memory_that_somebody_chose_is_refused(nowhere: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    with pytest.raises(Unsupported, match="memory://"):
        nowhere.conf.timezone  # noqa: B018
