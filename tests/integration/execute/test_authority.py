"""Admission while the ledger is gone: the votes, the pull from Postgres, and the return to the ledger.

The broker is another Redis here. All intervals are a tenth of the usual ones: nobody decides for 1 s after the
authority changed, and a worker is lost after 7.5 s.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from celery.exceptions import TaskRevokedError, WorkerLostError
from sqlalchemy import create_engine, make_url, text

from celery_capacity.platform.embedded import valkey
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import Authority, change_pause, read_authority
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.model.states import FINAL
from celery_capacity.workers.process.exit_codes import Exit
from tests.faults.breaking.servers import Servers, own_servers
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.jobs.working import WORK, all_ended, send_work, states
from tests.fixtures.processes.platforms import READY, Platform
from tests.fixtures.servers.pair import ANSWER_WITHIN, empty_database, environment_of
from tests.fixtures.servers.proxy import Proxy
from tests.fixtures.waiting import until
from tests.tasks import gated
from tests.tasks.lasting import Gate
from tests.tasks.work import peaks, read, starts

ADD = "tests.fixtures.tasks.add"


@pytest.fixture(scope="module")
def own_pair() -> Iterator[Servers]:
    with own_servers() as servers:
        yield servers


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of another Redis, for messages and results."""
    server = valkey.start(tmp_path_factory.mktemp("broker"), 0, durable=False)
    yield server.url
    server.kill()


@pytest.fixture
def servers(own_pair: Servers) -> Iterator[Servers]:
    own_pair.whole()
    yield own_pair
    own_pair.whole()


#: Mark of tests whose results are in the ledger's Redis, and gone with it.
results_beside_the_ledger = pytest.mark.parametrize("results", ["ledger"], indirect=True)


@pytest.fixture
def results(request: pytest.FixtureRequest, servers: Servers, broker: str) -> str:
    """Return the URL of the result store."""
    return servers.pair.redis_url if hasattr(request, "param") else broker


@pytest.fixture
def platform(servers: Servers, broker: str, results: str, tmp_path: Path) -> Iterator[Platform]:
    with empty_database(servers.pair) as database_url, servers.admin() as admin, redis.Redis.from_url(broker) as other:
        admin.flushall()
        other.flushall()
        environment = environment_of(servers.pair.redis_url, database_url, tmp_path)
        environment |= {
            "CELERY_BROKER_URL": broker,
            "CELERY_RESULT_BACKEND": results,
            "PLATFORM_IMPORTS": "tests.fixtures.tasks,tests.tasks.work,tests.tasks.ends,tests.tasks.gated",
        }
        engine = create_engine(database_url)
        with redis.Redis.from_url(environment["REDIS_URL"], socket_timeout=ANSWER_WITHIN) as client:
            running = Platform(Settings.from_environ(environment), environment, tmp_path, engine, client)
            yield running
            running.stop()
        engine.dispose()


def authority(platform: Platform) -> Authority:
    with platform.engine.connect() as connection:
        return read_authority(connection)


def decides(platform: Platform, who: str) -> Authority:
    """Return the authority row as soon as it names this authority."""

    def found() -> Authority | None:
        row = authority(platform)
        return row if row.authority == who else None

    row = until(found, lambda: f"{who} decides: {authority(platform)}")
    assert row is not None
    return row


def first_starts(platform: Platform) -> dict[int, datetime]:
    """Return when the first attempt of each epoch began."""
    with platform.engine.connect() as connection:
        rows = connection.execute(text("SELECT epoch, min(started_at) FROM attempts GROUP BY epoch"))
        return {row[0]: row[1] for row in rows}


def test_without_the_ledger_jobs_start_from_postgres_and_each_runs_once(
    platform: Platform, servers: Servers, submitter: Submitter, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    for name in ("a", "b"):
        platform.worker(name, cpus=2)
    send_work(submitter, trace, range(20), 0.2)
    until(lambda: starts(read(trace)).total() >= 4, "work has begun")
    servers.kill_redis()
    send_work(submitter, trace, range(20, 40), 0.2)
    gone = decides(platform, "postgres")
    assert gone.epoch > 1
    send_work(submitter, trace, range(40, 60), 0.05)
    assert all_ended(platform, 60) == {"succeeded": 60}
    assert submitter.value(submitter.send(ADD, 40, 2)) == 42
    servers.start_redis()
    back = decides(platform, "ledger")
    assert back.epoch > gone.epoch
    send_work(submitter, trace, range(60, 80), 0.05)
    assert all_ended(platform, 81) == {"succeeded": 81}
    assert starts(read(trace)) == {str(label): 1 for label in range(80)}
    assert max(peaks(read(trace)).values()) <= 2000
    until(lambda: submitter.allocated_cpus() == "0", "nothing is allocated")
    # Nobody decides before every permission of the old authority has run out.
    pause = timedelta(seconds=change_pause(platform.settings.confirm_interval))
    began = {epoch: first for epoch, first in first_starts(platform).items() if epoch >= gone.epoch}
    assert began[gone.epoch] >= gone.changed + pause
    assert back.epoch not in began
    assert min(began[epoch] for epoch in began if epoch > back.epoch) >= back.changed + pause


@results_beside_the_ledger
def test_results_that_were_kept_in_the_ledgers_redis_wait_for_it(
    platform: Platform, servers: Servers, submitter: Submitter, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    platform.worker("a", cpus=4)
    # The jobs end before and after the votes. Some of these ends were meant to reach the ledger first.
    jobs = [send_work(submitter, trace, [label], 1.0 + 0.5 * label)[0] for label in range(4)]
    until(lambda: starts(read(trace)).total() == 4, "all four run")
    servers.kill_redis()
    decides(platform, "postgres")
    jobs += send_work(submitter, trace, range(4, 8), 0.05)
    assert all_ended(platform, 8) == {"succeeded": 8}
    servers.start_redis()
    assert [submitter.value(job) for job in jobs] == [str(label) for label in range(8)]
    decides(platform, "ledger")
    assert submitter.value(submitter.send(ADD, 40, 2)) == 42


def test_hung_ledger_comes_back_with_old_books_and_admits_nothing(
    platform: Platform, servers: Servers, submitter: Submitter, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    for name in ("a", "b"):
        platform.worker(name, cpus=2, pool="threads")
    send_work(submitter, trace, range(30), 0.2)
    until(lambda: starts(read(trace)).total() >= 4, "work has begun")
    server = valkey.running(servers.redis_folder)
    assert server is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        gone = decides(platform, "postgres")
        send_work(submitter, trace, range(30, 40), 0.05)
        until(lambda: starts(read(trace)).total() > 30, "work goes on")
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert decides(platform, "ledger").epoch > gone.epoch
    assert all_ended(platform, 40) == {"succeeded": 40}
    assert starts(read(trace)) == {str(label): 1 for label in range(40)}
    assert max(peaks(read(trace)).values()) <= 2000
    until(lambda: submitter.allocated_cpus() == "0", "nothing is allocated")


@pytest.fixture
def alone(platform: Platform, servers: Servers) -> Iterator[Platform]:
    """Yield a platform of two workers with two CPUs each, where Postgres decides."""
    for name in ("a", "b"):
        platform.worker(name, cpus=2)
    servers.kill_redis()
    decides(platform, "postgres")
    yield platform
    # The books are checked once the ledger decides again and all jobs are over.
    if valkey.running(servers.redis_folder) is None:
        servers.start_redis()
    decides(platform, "ledger")
    until(lambda: not states(platform).keys() - set(FINAL), lambda: f"all jobs are over: {states(platform)}")
    until(lambda: platform.redis.get(keys.ALLOCATED_CPUS) == b"0", "nothing is allocated")


def test_a_worker_that_lost_the_ledger_alone_never_changes_who_decides(
    platform: Platform, submitter: Submitter, tmp_path: Path, proxied: Callable[[str], Proxy], gate: Gate
) -> None:
    path = proxied(str(platform.settings.redis_url))
    platform.worker("a", cpus=2)
    platform.worker("b", cpus=2, REDIS_URL=path.url)
    before = authority(platform)
    path.refuse()
    lost_for = "SELECT coalesce(extract(epoch FROM now() - ledger_lost_at), 0)::float FROM workers WHERE name = 'b'"

    def seconds() -> float:
        with platform.engine.connect() as connection:
            return float(connection.execute(text(lost_for)).scalar_one())

    until(lambda: seconds() > 3 * change_pause(platform.settings.confirm_interval), "b has been without it for long")
    assert replace(authority(platform), age=0) == replace(before, age=0)
    send_work(submitter, tmp_path / "trace", range(10), 0.05)
    assert all_ended(platform, 10) == {"succeeded": 10}
    path.restore()
    until(lambda: seconds() == 0, "b reaches it again")
    # The jobs fill both workers, so that a cannot run them all.
    send_work(submitter, tmp_path / "trace", range(10, 14), gate)
    until(lambda: {event.worker for event in read(tmp_path / "trace")} == {"a", "b"}, "b works again")
    gate.open()
    assert all_ended(platform, 14) == {"succeeded": 14}


def test_what_a_killed_worker_pulled_runs_again_when_it_is_lost(
    alone: Platform, submitter: Submitter, tmp_path: Path, gate: Gate
) -> None:
    trace = tmp_path / "trace"
    killed = next(process for process in alone.processes if process.name == "b")
    jobs = send_work(submitter, trace, range(4), gate)
    until(lambda: starts(read(trace)).total() == 4, "all four run")
    killed.kill()
    gate.open()
    assert all_ended(alone, 4) == {"succeeded": 4}
    again = [job for job in jobs if submitter.row(job).attempt == 2]
    assert len(again) == 2
    for job in again:
        assert submitter.outcomes(job) == ["lost", "succeeded"]
        assert (submitter.row(job).losses, submitter.row(job).worker) == (1, "a")
    with alone.engine.connect() as connection:
        rows = connection.execute(text("SELECT name, status FROM workers"))
        assert {row.name: row.status for row in rows} == {"a": "ready", "b": "lost"}


def test_retries_countdowns_expiries_and_revokes_work_without_the_ledger(
    alone: Platform, submitter: Submitter, tmp_path: Path, gate: Gate
) -> None:
    again = submitter.send("tests.tasks.ends.again", 2)
    later = submitter.send("tests.tasks.ends.again", 1, 0.3)
    assert (submitter.value(again)["retries"], submitter.value(later)["retries"]) == (2, 1)
    assert submitter.ended(again).state == submitter.ended(later).state == "succeeded"
    assert submitter.outcomes(again) == ["retried", "retried", "succeeded"]
    failed = submitter.send("tests.fixtures.tasks.fail", "so it is")
    with pytest.raises(ValueError, match="so it is"):
        submitter.value(failed)
    assert submitter.ended(failed).state == "failed"
    due = submitter.send(ADD, 1, 2, countdown=0.5)
    assert submitter.value(due) == 3
    assert submitter.row(due).started_at >= submitter.row(due).due_at
    full = send_work(submitter, tmp_path / "trace", range(4), gate)
    until(lambda: starts(read(tmp_path / "trace")).total() == 4, "both are full")
    revoked, expired = submitter.send(ADD, 1, 1), submitter.send(ADD, 1, 1, expires=0.5)
    submitter.app.control.revoke(revoked)
    assert submitter.row(revoked).state == "cancelled"
    assert submitter.ended(expired).state == "expired"
    gate.open()
    for job in (revoked, expired):
        with pytest.raises(TaskRevokedError):
            submitter.value(job)
    assert [submitter.ended(job).state for job in full] == ["succeeded"] * 4


def test_gates_open_and_shut_without_the_ledger_and_stay_so_afterwards(
    alone: Platform, servers: Servers, submitter: Submitter, tmp_path: Path, gate: Gate
) -> None:
    trace, second = str(tmp_path / "trace"), Gate(tmp_path / "second gate")
    # Of jobs with equal unique keys one is accepted, until it has ended.
    only = submitter.send(WORK, trace, "only", str(gate), unique="one of these")
    assert submitter.send(WORK, trace, "only", str(gate), unique="one of these") == only
    # A dependent job starts when all its dependencies have succeeded. It ends without a start when one has not.
    after = submitter.send(ADD, 1, 2, after=[only])
    failed = submitter.send("tests.fixtures.tasks.fail", "no")
    never = submitter.send(ADD, 1, 2, after=[only, failed])
    gate.open()
    assert submitter.value(after) == 3
    assert submitter.ended(only).finished_at <= submitter.ended(after).started_at
    with pytest.raises(TaskRevokedError, match="which it needs"):
        submitter.value(never)
    assert submitter.ended(never).state == "cancelled"
    again = submitter.send(WORK, trace, "again", 0.05, unique="one of these")
    assert again != only
    # Two workers together start no more jobs than a rate limit allows, also after the limit is changed.
    often = [submitter.send(gated.often.name) for _ in range(8)]
    due = sorted(submitter.ended(job).due_at for job in often)
    assert all(number <= 20 * (at - due[0]).total_seconds() + 1 for number, at in enumerate(due))
    seldom = [submitter.send(gated.seldom.name) for _ in range(3)]
    assert submitter.ended(seldom[0]).state == "succeeded"
    assert [submitter.row(job).state for job in seldom[1:]] == ["scheduled"] * 2
    submitter.app.control.rate_limit(gated.seldom.name, "20/s")
    assert {submitter.ended(job).state for job in seldom} == {"succeeded"}
    # Waiting jobs go over to the ledger with their constraints, which open there.
    submitter.app.control.rate_limit(gated.unlimited.name, "1/h")
    limited = [submitter.send(gated.unlimited.name) for _ in range(2)]
    assert submitter.ended(limited[0]).state == "succeeded"
    running = submitter.send(WORK, trace, "running", str(second))
    later = submitter.send(ADD, 3, 4, after=running)
    until(lambda: starts(read(Path(trace)))["running"], "it runs")
    assert authority(alone).authority == "postgres"
    servers.start_redis()
    decides(alone, "ledger")
    assert submitter.row(limited[1]).state == "scheduled"
    second.open()
    submitter.app.control.rate_limit(gated.unlimited.name, 0)
    assert submitter.value(later) == 7
    assert {submitter.ended(job).state for job in (limited[1], running, again)} == {"succeeded"}
    assert submitter.ended(running).finished_at <= submitter.ended(later).started_at
    assert starts(read(Path(trace))) == {"only": 1, "again": 1, "running": 1}


def test_a_job_that_loses_its_process_is_alone_at_last_and_lost_then(
    alone: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    poison = submitter.send("tests.tasks.ends.again_and_more", "dies", task_id="poison")
    assert submitter.ended(poison).state == "succeeded"
    assert submitter.outcomes(poison) == ["lost", "succeeded"], "the retry that it published ran"
    deadly = submitter.send("tests.tasks.work.die")
    assert submitter.ended(deadly).state == "lost"
    assert submitter.outcomes(deadly) == ["lost"] * 3
    with pytest.raises(WorkerLostError):
        submitter.value(deadly)


def test_cluster_is_shown_and_workers_come_and_go_without_the_ledger(
    alone: Platform, submitter: Submitter, tmp_path: Path, gate: Gate
) -> None:
    running = send_work(submitter, tmp_path / "trace", range(4), gate)
    until(lambda: starts(read(tmp_path / "trace")).total() == 4, "both are full")
    shown = overview.read(quick_client(alone.redis), alone.engine, alone.settings.worker_ttl)
    assert (shown.source, shown.allocated("cpus"), len(shown.workers)) == ("postgres", 4000, 2)
    leaving = next(process for process in alone.processes if process.name == "b")
    leaving.signal(signal.SIGTERM)
    alone.worker("c", cpus=2)
    waits = submitter.send(ADD, 40, 2)
    assert submitter.value(waits) == 42
    assert submitter.ended(waits).worker in ("a", "c")
    gate.open()
    assert leaving.wait() == 0
    assert [submitter.ended(job).state for job in running] == ["succeeded"] * 4
    with alone.engine.connect() as connection:
        rows = connection.execute(text("SELECT name, status FROM workers"))
        assert {row.name: row.status for row in rows} == {"a": "ready", "b": "left", "c": "ready"}


def test_postgres_older_than_the_ledger_opens_an_epoch_above_both(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    platform.worker("a", cpus=2)
    with platform.engine.begin() as connection:
        # A restored backup may be older than the opening of the ledger.
        newest = connection.execute(text("SELECT epoch FROM authority")).scalar_one()
        connection.execute(text("UPDATE authority SET epoch = 1"))
    until(lambda: authority(platform).epoch > newest, "an epoch is open that is newer than both")
    send_work(submitter, tmp_path / "trace", range(6), 0.05)
    assert all_ended(platform, 6) == {"succeeded": 6}


@pytest.mark.parametrize("order", [("redis", "postgres"), ("postgres", "redis")])
def test_a_worker_that_starts_while_both_stores_are_down_waits_for_them(
    platform: Platform, servers: Servers, submitter: Submitter, order: tuple[str, str]
) -> None:
    # Test servers forget their last commits when they are killed. Nothing is committed here yet.
    servers.kill_redis()
    servers.kill_postgres()
    platform.engine.dispose()
    # A single Redis serves as ledger, broker and result backend.
    redis_url = str(platform.settings.redis_url)
    worker = platform.worker("a", cpus=2, ready=False, CELERY_BROKER_URL=redis_url, CELERY_RESULT_BACKEND=redis_url)
    worker.wait_for("waiting for a store: Postgres")
    ended = platform.worker("b", cpus=2, ready=False)
    ended.wait_for("waiting for a store")
    ended.signal(signal.SIGTERM)
    assert ended.wait() != 0
    for store in order:
        assert worker.alive
        {"redis": servers.start_redis, "postgres": servers.start_postgres}[store]()
    worker.wait_for(READY)
    assert submitter.ended(submitter.send(ADD, 40, 2)).state == "succeeded"


def test_a_wrong_password_or_database_is_not_waited_for(platform: Platform, servers: Servers) -> None:
    wrong = make_url(str(platform.settings.database_url)).set(database="nowhere").render_as_string(hide_password=False)
    done = platform.celery("worker", "--pool", "solo", NODE_NAME="a", DATABASE_URL=wrong)
    assert done.returncode == Exit.CONFIGURATION
    assert '"nowhere" does not exist' in done.stderr
    port = urlsplit(servers.pair.redis_url).port
    protected = urlsplit(str(platform.settings.redis_url))._replace(netloc=f"nobody:wrong@127.0.0.1:{port}")
    done = platform.celery("worker", "--pool", "solo", NODE_NAME="a", REDIS_URL=protected.geturl())
    assert done.returncode == Exit.CONFIGURATION
    assert "wrong" not in done.stderr.replace("WRONGPASS", "")
