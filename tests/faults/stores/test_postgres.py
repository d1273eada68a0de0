"""Postgres dies, is locked or takes no connection.

Submits raise, work goes on, and jobs that ended meanwhile are written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text

from celery_capacity.platform.embedded import postgres
from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown
from celery_capacity.routing.ledger import keys
from tests.faults.breaking.faults import World
from tests.faults.breaking.servers import Servers
from tests.faults.judging.watching import Oracle
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"

#: Durations in seconds, a tenth of those in the table of faults. The lock outlasts a statement's lock timeout.
POSTGRES = {
    "kill Postgres": 2.0,
    "lock the table of jobs": 4.0,
    "use up the connections of Postgres": 2.0,
    "Postgres is half open": 2.0,
    "drop all connections to Postgres": 0.0,
}


@pytest.mark.long
@pytest.mark.parametrize(("kind", "seconds"), POSTGRES.items())
def test_every_job_ends_once_whatever_becomes_of_postgres(
    world: World, submitter: Submitter, oracle: Oracle, kind: str, seconds: float
) -> None:
    for name in ("a", "b"):
        world.start(name, ready=True)
    with oracle.flow(submitter):
        oracle.until_runs(20)
        with world.broken(kind, seconds):
            pass
        oracle.until_more(20)
    oracle.assert_zeros()


def lease_ms(platform: Platform, worker: str) -> int:
    """Return the end of the worker's lease in milliseconds, by the ledger's clock."""
    lease: Any = platform.redis.hget(keys.book(worker), "lease")
    return int(lease)


@pytest.mark.long
def test_running_jobs_end_without_postgres_and_are_written_once_afterwards(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    worker = platform.worker("a", cpus=4)
    jobs = [submitter.send(HOLD, "gate", cpus=2) for _ in range(2)]
    for _ in jobs:
        tasks.started(platform.redis, "gate")
    old = Celery("old", broker=platform.settings.redis_url, set_as_current=False)
    servers.kill_postgres()
    platform.engine.dispose()

    for _ in range(3):
        with pytest.raises((NotAccepted, OutcomeUnknown)):
            oracle.send(submitter)
    left = old.send_task(ADD, [40, 2])
    tasks.let_go(platform.redis, "gate", len(jobs))
    assert [submitter.value(job) for job in jobs] == ["a", "a"]
    until(lambda: submitter.allocated_cpus() == "0", "what they held is free")
    worker.wait_for("Postgres does not take")
    # The worker stays alive for the others, however long the outage lasts.
    before = lease_ms(platform, "a")
    until(lambda: lease_ms(platform, "a") >= before + 2000, "its heartbeats go on")
    assert submitter.view("a")["status"] == "ready"

    servers.start_postgres()
    rows = [submitter.ended(job) for job in jobs]
    assert [(row.state, row.attempt, row.worker) for row in rows] == [("succeeded", 1, "a")] * 2
    assert [submitter.outcomes(job) for job in jobs] == [["succeeded"]] * 2
    assert submitter.ended(left.id).state == "succeeded"
    assert submitter.value(submitter.send(ADD, 1, 1, cpus=4)) == 2
    assert submitter.jobs() == 4
    assert oracle.runs() == 0
    old.close()


def test_postgres_of_a_test_keeps_what_it_said_is_committed(servers: Servers, platform: Platform) -> None:
    """Otherwise the row admits an ended job again, and the ledger knows nothing of the job any more."""
    with platform.engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (number int)"))
    for number in range(3):
        with platform.engine.begin() as connection:
            connection.execute(text("INSERT INTO kept VALUES (:number)"), {"number": number})
        servers.kill_postgres()
        servers.start_postgres()
        platform.engine.dispose()
        with platform.engine.connect() as connection:
            assert connection.execute(text("SELECT max(number) FROM kept")).scalar() == number


@pytest.mark.parametrize("how", ["killed", "crashed"])
def test_who_submits_after_postgres_was_started_again_does_not_notice(
    servers: Servers, platform: Platform, submitter: Submitter, how: str
) -> None:
    platform.worker("a", cpus=4)
    ways: dict[str, Callable[[], str]] = {
        "at once": lambda: submitter.send(ADD, 1, 1),
        "put off": lambda: submitter.send(ADD, 1, 1, countdown=0.1),
        "many": lambda: submitter.app.submit_many(ADD, [(1, 1)] * 3).id(0),
    }
    for name, send in ways.items():
        # The client has connections, and nobody uses them meanwhile.
        submitter.ended(send())
        if how == "killed":
            servers.kill_postgres()
        else:
            # Each process of a crashed Postgres tells its client before it ends.
            server = postgres.running(servers.postgres_folder)
            assert server is not None
            assert server.kill()
        servers.start_postgres()
        platform.engine.dispose()
        assert submitter.ended(send()).state == "succeeded", name
