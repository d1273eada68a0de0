"""The price of slow, silent or full stores for a sender.

Redis costs a moment, once. Postgres costs three seconds at most. The worker's main loop pays nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import redis
from celery import Celery
from sqlalchemy import text

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.errors import NotAccepted
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.dispatch import call_budget
from celery_capacity.workers.dispatch.circuit import Circuit
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit import constraints
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import FOREIGN, Platform
from tests.fixtures.servers.proxy import Proxy
from tests.fixtures.waiting import PATIENCE, until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"

#: Seconds of the longest wait that is promised.
PROMISED = 3.0

Disturb = Callable[[Proxy], None]

DISTURBED = pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda proxy: proxy.delay(2.0), id="answers after 2 s"),
        pytest.param(lambda proxy: proxy.delay(0.9), id="each answer just in time"),
        pytest.param(lambda proxy: proxy.swallow(), id="half-open"),
        pytest.param(lambda proxy: proxy.hold(), id="paused"),
        pytest.param(lambda proxy: proxy.refuse(), id="down"),
    ],
)


@pytest.fixture
def ledger_path(platform: Platform, proxied: Callable[[str], Proxy]) -> Proxy:
    return proxied(str(platform.settings.redis_url))


@pytest.fixture
def app(platform: Platform, ledger_path: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """Yield a submitter that sees the ledger through the proxy."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    settings = platform.settings.with_urls(ledger_path.url, str(platform.settings.database_url))
    app = create_app("far away", resolve=lambda _: settings)
    yield app
    app.platform.sending.close()
    app.close()
    app.platform.engine.dispose()


@pytest.fixture
def questions(app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each question of the submitter to its ledger adds the name of its thread."""
    asked: list[str] = []
    call = Circuit.call

    def noted(circuit: Circuit) -> Any:
        asked.append(threading.current_thread().name)
        return call(circuit)

    monkeypatch.setattr(Circuit, "call", noted)
    return asked


@DISTURBED
@pytest.mark.parametrize("connected", [True, False], ids=["connected before", "first connection"])
def test_a_ledger_that_does_not_answer_costs_a_submitter_a_moment_once(
    platform: Platform,
    submitter: Submitter,
    app: Celery,
    ledger_path: Proxy,
    questions: list[str],
    disturb: Disturb,
    connected: bool,
) -> None:
    platform.worker("a", 4, "threads")
    jobs = [app.send_task(ADD, [0, 0]).id] if connected else []
    disturb(ledger_path)
    jobs.append(app.send_task(ADD, [1, 1]).id)
    # A thread tells the ledger about the second job in a row.
    until(lambda: not app.platform.breaker.closed, "the ledger is left alone")
    questions.clear()
    jobs += [app.send_task(ADD, [1, 1]).id for _ in range(30)]
    assert questions == []
    assert not app.platform.breaker.closed
    # The sweep brings the jobs to the ledger, by the worker's own connection.
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
    ledger_path.restore()
    until(lambda: app.platform.breaker.closed, "the ledger is asked again")
    fast = app.send_task(ADD, [2, 2]).id
    assert submitter.value(fast) == 4
    assert not any(thread.name == "breaker" for thread in threading.enumerate())


def test_jobs_that_the_ledger_missed_reach_it_without_a_sweep(
    platform: Platform, submitter: Submitter, app: Celery, ledger_path: Proxy
) -> None:
    worker = platform.worker("a", 4, "threads")
    assert submitter.value(app.send_task(ADD, [0, 0]).id) == 0
    worker.signal(signal.SIGSTOP)
    app.platform.breaker._keep_for = PATIENCE
    ledger_path.refuse()
    jobs = [app.send_task(ADD, [number, 1]).id for number in range(3)]
    assert app.platform.sending.flush()
    assert not platform.redis.exists(*map(keys.job, jobs))
    ledger_path.restore()
    until(lambda: platform.redis.exists(*map(keys.job, jobs)) == 3, "the ledger has them")
    worker.signal(signal.SIGCONT)
    assert [submitter.value(job) for job in jobs] == [1, 2, 3]


def test_task_known_to_workers_alone_is_sent_while_the_ledger_is_silent(
    platform: Platform, submitter: Submitter, app: Celery, ledger_path: Proxy, questions: list[str]
) -> None:
    platform.worker("a", 4, "threads")
    ledger_path.swallow()
    jobs = [app.send_task("tests.nowhere.unknown", [number]).id for number in range(10)]
    # The first question opens the breaker, for the thread of the submissions too.
    assert 1 <= len(questions) <= 2
    assert not submitter.row(jobs[0]).declared


def test_a_healthy_ledger_costs_no_thread(platform: Platform, submitter: Submitter, app: Celery) -> None:
    platform.worker("a", 4, "threads")
    for number in range(20):
        app.send_task(ADD, [number, 1])
    assert app.platform.breaker.closed
    assert not any(thread.name == "breaker" for thread in threading.enumerate())


def test_the_same_publish_again_obeys_the_breaker(
    platform: Platform, submitter: Submitter, app: Celery, ledger_path: Proxy, questions: list[str]
) -> None:
    platform.worker("a", 4, "threads")
    held = [submitter.send(HOLD, "gate") for _ in range(4)]
    ledger_path.refuse()
    jobs = [app.send_task(ADD, [1, 1], task_id=f"job-{number}").id for number in range(10)]
    assert app.platform.sending.flush()
    ledger_path.restore()
    until(lambda: app.platform.breaker.closed, "the ledger is asked again")
    ledger_path.swallow()
    questions.clear()
    for job in jobs:
        app.send_task(ADD, [1, 1], task_id=job)
    assert 1 <= len(questions) <= 2
    tasks.let_go(platform.redis, "gate", len(held))
    assert {submitter.ended(job).state for job in (*held, *jobs)} == {"succeeded"}


def test_a_child_of_a_submitter_has_a_breaker_of_its_own(platform: Platform, app: Celery, ledger_path: Proxy) -> None:
    platform.worker("a", 4, "threads")
    app.send_task(ADD, [1, 1])
    ledger_path.refuse()
    app.send_task(ADD, [1, 1])
    # This job follows another one at once, so a thread asks the ledger.
    assert app.platform.sending.flush()
    assert not app.platform.breaker.closed
    child = os.fork()
    if child == 0:
        code = 1
        try:
            closed = app.platform.breaker.closed
            app.send_task(ADD, [1, 1], task_id="of-the-child")
            code = 0 if closed and not app.platform.breaker.closed else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    with platform.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs WHERE id = 'of-the-child'")).scalar_one() == 1


def test_an_attempt_is_bounded_however_many_answers_it_waits_for(
    redis_url: str, proxied: Callable[[str], Proxy]
) -> None:
    path = proxied(redis_url)
    client = call_budget.bounded(connect(path.url, socket_timeout=0.4, socket_connect_timeout=0.4))
    path.delay(0.2)
    answers = 0
    with pytest.raises(redis.TimeoutError, match="too slowly"), call_budget.attempt(1.0):  # noqa: PT012
        while True:
            client.ping()
            answers += 1
    assert answers <= 3
    # Without an attempt each wait has its own bound. A late answer is not taken for the answer to the next question.
    assert client.echo("mine") == b"mine"
    client.close()


# -- Postgres


def test_a_locked_table_is_an_error_in_three_seconds(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", 4, "threads")
    assert submitter.value(submitter.send(ADD, 1, 1)) == 2
    with platform.engine.begin() as connection:
        connection.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(NotAccepted, match="lock timeout"):
            submitter.send(ADD, 1, 2)
        # The worker's main loop is free: it answers remote control.
        assert submitter.app.control.ping(timeout=PATIENCE, limit=1)
        assert worker.alive
    assert submitter.value(submitter.send(ADD, 1, 3)) == 4


def test_a_server_that_lets_nobody_in_is_an_error_in_three_seconds(
    platform: Platform, submitter: Submitter, proxied: Callable[[str], Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first job reads the rate limits beforehand, since a sender reads them once in a while.
    monkeypatch.setattr(constraints, "RATES_FOR", 1000.0)
    platform.worker("a", 4, "threads")
    postgres_path = proxied(str(platform.settings.database_url))
    settings = platform.settings.with_urls(str(platform.settings.redis_url), postgres_path.url)
    app = create_app("far away", resolve=lambda _: settings)
    assert submitter.value(app.send_task(ADD, [1, 0]).id) == 1
    app.platform.engine.dispose()
    app.platform.inserter.close()
    postgres_path.swallow()
    with pytest.raises(NotAccepted, match="timeout expired"):
        app.send_task(ADD, [1, 1])
    postgres_path.restore()
    assert submitter.value(app.send_task(ADD, [1, 2]).id) == 3
    app.platform.sending.close()
    app.close()
    app.platform.engine.dispose()
    app.platform.inserter.close()


def test_an_exhausted_pool_is_an_error_in_three_seconds(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 4, "threads")
    stores: Stores = submitter.app.platform
    submitter.send(ADD, 1, 1)
    taken: list[Any] = []
    pool: Any = stores.engine.pool
    while len(taken) < pool.size() + pool._max_overflow:
        taken.append(stores.engine.connect())
    # Another thread sends a job by the connection that is kept for that.
    with stores.inserter._free, pytest.raises(NotAccepted, match="no connection to Postgres was free"):
        submitter.send(ADD, 1, 2)
    for connection in taken:
        connection.close()
    submitter.send(ADD, 1, 3)
    # The pool gives up a connection that was closed behind its back, and does not hand it out again and again.
    _close_behind_their_backs(stores)
    assert submitter.value(submitter.send(ADD, 1, 4, task_id="four")) == 5
    with stores.inserter._free:
        assert submitter.value(submitter.send(ADD, 1, 5)) == 6
    # Both connections are closed, and this job needs both because its id exists already.
    _close_behind_their_backs(stores)
    assert submitter.value(submitter.send(ADD, 1, 4, task_id="four")) == 5


def _close_behind_their_backs(stores: Stores) -> None:
    """Close the connections as a restart of Postgres does, or an administrator who ends all sessions."""
    with closing(stores.engine.raw_connection()) as pooled:
        pooled.driver_connection.close()  # type: ignore[union-attr]
    kept: Any = stores.inserter._connection
    kept.driver_connection.close()


def test_the_bound_of_an_attempt_is_the_promised_one() -> None:
    for part in (timeouts.QUICK_ATTEMPT, timeouts.LOCK, timeouts.CONNECT):
        assert part * timeouts.STORE_TIMEOUT <= PROMISED
