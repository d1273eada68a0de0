"""Every call to a store ends, also where the store is stopped and its kernel goes on to acknowledge."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown, PartlyAccepted, PlatformError, StoreUnavailable
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.client.job import job
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.stores import make_engine
from celery_capacity.workers.submit.submit_many import submit_many
from tests.faults.breaking.servers import Servers, own_servers
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.platforms import FOREIGN, ROOT, Platform
from tests.fixtures.servers.pair import empty_database, empty_redis, environment_of
from tests.fixtures.servers.stalling import ENDS_WITHIN, ending, postgres_pids, redis_pids, stalled

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"

#: Seconds of the limit under test. A call that waits for nothing takes a thousandth of it.
LIMIT = 1.0


@pytest.fixture(scope="module")
def own_pair() -> Iterator[Servers]:
    with own_servers() as servers:
        yield servers


@pytest.fixture
def platform(own_pair: Servers, tmp_path: Path) -> Iterator[Platform]:
    with empty_database(own_pair.pair) as database_url, empty_redis(own_pair.pair) as redis_url:
        environment = {**environment_of(redis_url, database_url, tmp_path), "PLATFORM_STORE_TIMEOUT": str(LIMIT)}
        with platform_on(environment, tmp_path) as running:
            yield running


@pytest.fixture
def submitter(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submitter]:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    submitter = Submitter(platform)
    yield submitter
    submitter.close()


def test_delay_says_unknown_where_postgres_stalls_around_the_commit(
    own_pair: Servers, platform: Platform, submitter: Submitter
) -> None:
    submitter.send(ADD, 1, 2)
    with stalled(postgres_pids(own_pair)), pytest.raises(OutcomeUnknown) as caught:
        ending(lambda: submitter.send(ADD, 1, 2, task_id="one"))
    assert caught.value.job_id == "one"
    # The statement was on its way, and the server may carry it out now. The same id makes no second job.
    submitter.send(ADD, 1, 2, task_id="one")
    assert submitter.jobs() == 2
    platform.worker("a", 4, "threads")
    assert submitter.value("one") == 3


def test_delay_says_not_accepted_where_no_connection_is_made(own_pair: Servers, submitter: Submitter) -> None:
    with stalled(postgres_pids(own_pair)), pytest.raises(NotAccepted):
        ending(lambda: submitter.send(ADD, 1, 2, task_id="one"))
    assert submitter.jobs() == 0


def test_delay_says_not_accepted_where_postgres_stalls_before_the_commit(
    own_pair: Servers, platform: Platform, submitter: Submitter
) -> None:
    """A job that waits for another one is written in a transaction of several statements."""
    first = submitter.send(ADD, 1, 2)
    submitter.send(ADD, 1, 2, after=[first])
    with stalled(postgres_pids(own_pair)), pytest.raises(NotAccepted):
        ending(lambda: submitter.send(ADD, 1, 2, task_id="one", after=[first]))
    assert submitter.jobs() == 2
    platform.worker("a", 4, "threads")


def test_submit_many_says_unknown_where_postgres_stalls_around_the_commit(
    own_pair: Servers, platform: Platform, submitter: Submitter
) -> None:
    submit_many(submitter.app, ADD, [(1, 2)])
    with stalled(postgres_pids(own_pair)), pytest.raises(PartlyAccepted) as caught:
        ending(lambda: submit_many(submitter.app, ADD, [(1, n) for n in range(5)]))
    assert caught.value.accepted == 0
    assert len(caught.value.unknown) == 5
    platform.worker("a", 4, "threads")


def test_transactional_enqueue_says_not_accepted_where_postgres_stalls(
    own_pair: Servers, platform: Platform, submitter: Submitter
) -> None:
    with platform.engine.connect() as connection:
        submitter.send(ADD, 1, 2, task_id="one", session=connection)
        with stalled(postgres_pids(own_pair)), pytest.raises(NotAccepted):
            ending(lambda: submitter.send(ADD, 1, 2, task_id="two", session=connection))
        connection.rollback()
    assert submitter.jobs() == 0


def test_revoke_and_a_look_at_a_job_say_so_where_postgres_stalls(
    own_pair: Servers, platform: Platform, submitter: Submitter
) -> None:
    job_id = submitter.send(ADD, 1, 2)
    with stalled(postgres_pids(own_pair)):
        with pytest.raises(StoreUnavailable):
            ending(lambda: submitter.app.control.revoke(job_id))
        with pytest.raises(StoreUnavailable):
            ending(lambda: job(job_id, submitter.app).now())
    platform.worker("a", 4, "threads")
    submitter.ended(job_id)


def test_commands_end_with_a_clear_error_where_postgres_stalls(own_pair: Servers, platform: Platform) -> None:
    with stalled(postgres_pids(own_pair)):
        for command in (["jobs"], ["reconcile"], ["verify"], ["db", "current"]):
            done = ending(partial(platform.celery, *command))
            assert done.returncode != 0, done.stdout
            assert "Traceback" not in done.stderr
            assert "Postgres" in done.stdout + done.stderr


def test_worker_goes_on_and_ends_where_postgres_stalls(
    own_pair: Servers, platform: Platform, submitter: Submitter
) -> None:
    worker = platform.worker("a", 4, "threads")
    # A worker that has nothing to do asks Postgres nothing, so this one gets a job.
    held = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    with stalled(postgres_pids(own_pair)):
        worker.wait_for("Postgres does not confirm")
    tasks.let_go(platform.redis, "gate")
    submitter.ended(held)
    # Each of the worker's threads has given up its connection, and has another one now.
    assert submitter.value(submitter.send(ADD, 2, 2)) == 4
    with stalled(postgres_pids(own_pair)):
        worker.signal(signal.SIGTERM)
        worker.wait()


@pytest.mark.parametrize("connected", [True, False], ids=["connected before", "first connection"])
def test_delay_is_accepted_where_redis_stalls(
    own_pair: Servers, platform: Platform, submitter: Submitter, connected: bool
) -> None:
    if connected:
        submitter.send(ADD, 1, 2)
    with stalled(redis_pids(own_pair)):
        ending(lambda: submitter.send(ADD, 1, 2, task_id="one"))
    assert submitter.row("one") is not None
    platform.worker("a", 4, "threads")
    assert submitter.value("one") == 3


def test_commands_end_where_redis_stalls(own_pair: Servers, platform: Platform) -> None:
    with stalled(redis_pids(own_pair)):
        for command in (["cluster"], ["jobs"], ["reconcile"], ["verify"]):
            done = ending(partial(platform.celery, *command))
            assert "Traceback" not in done.stderr, command


def test_revoke_ends_where_redis_stalls(own_pair: Servers, platform: Platform, submitter: Submitter) -> None:
    """The mark in Postgres is enough: the sweep goes on with it."""
    revoked = submitter.send(ADD, 1, 2)
    with stalled(redis_pids(own_pair)), suppress(PlatformError, OperationalError):
        ending(lambda: submitter.app.control.revoke(revoked))
    platform.worker("a", 4, "threads")
    assert submitter.ended(revoked).state == "cancelled"


def test_worker_goes_on_and_ends_where_redis_stalls(
    own_pair: Servers, platform: Platform, submitter: Submitter
) -> None:
    worker = platform.worker("a", 4, "threads")
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3
    with stalled(redis_pids(own_pair)):
        worker.wait_for("the ledger does not answer")
    assert submitter.value(submitter.send(ADD, 2, 2)) == 4
    with stalled(redis_pids(own_pair)):
        worker.signal(signal.SIGTERM)
        worker.wait()


def test_call_in_a_child_has_a_deadline_of_its_own(own_pair: Servers, submitter: Submitter) -> None:
    """The watchdog of the parent knows nothing of a child's calls."""
    engine = make_engine(str(submitter.platform.settings.database_url), timeout=LIMIT)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))

    def ask() -> int:
        try:
            with make_engine(str(submitter.platform.settings.database_url), timeout=LIMIT).connect() as connection:
                connection.execute(text("SELECT pg_sleep(3600)"))
        except DBAPIError as error:
            return 0 if isinstance(error.orig, deadlines.Stalled) else 1
        return 2

    pid = os.fork()
    if not pid:
        os._exit(ask())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    engine.dispose()


def test_call_that_is_answered_in_time_leaves_its_connection(own_pair: Servers, submitter: Submitter) -> None:
    engine = make_engine(str(submitter.platform.settings.database_url), timeout=LIMIT)
    with engine.connect() as connection:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with deadlines.patiently(3600.0):
            connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 2 * LIMIT})
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() == pid
    engine.dispose()


#: Program of greenlets, which the driver stops while it waits.
GREEN = """
from gevent import monkey
monkey.patch_all()
import sys
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from celery_capacity.routing.database.deadlines import Stalled
from celery_capacity.workers.process.stores import make_engine
try:
    with make_engine(sys.argv[1], timeout=1.0).connect() as connection:
        connection.execute(text("SELECT pg_sleep(3600)"))
except DBAPIError as error:
    print(type(error.orig).__name__)
"""


def test_call_between_greenlets_has_a_deadline(platform: Platform) -> None:
    command = [sys.executable, "-c", GREEN, str(platform.settings.database_url)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ENDS_WITHIN)
    assert done.stdout == "Stalled\n", done.stderr


def test_caller_who_waits_for_postgres_has_time_for_each_try(
    own_pair: Servers, platform: Platform, submitter: Submitter
) -> None:
    """Late chord parts publish the body in this way, after Postgres was away for longer than one limit."""
    tries: queue.SimpleQueue[None] = queue.SimpleQueue()

    def may_wait() -> bool:
        tries.put(None)
        return True

    def publish() -> None:
        with attempts.held(Attempt(Tag("job", Token(1, 1)), "life", patient=may_wait)):
            submitter.send(ADD, 1, 2, task_id="one")

    submitter.send(ADD, 1, 2)
    with ThreadPoolExecutor(1) as pool:
        with stalled(postgres_pids(own_pair)):
            publishing = pool.submit(publish)
            for _ in range(3):
                tries.get(timeout=ENDS_WITHIN)
        publishing.result(ENDS_WITHIN)
    assert submitter.jobs() == 2
    platform.worker("a", 4, "threads")
    assert submitter.value("one") == 3
