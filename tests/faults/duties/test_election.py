"""A single worker runs the duties. When it dies or stops, another worker takes over.

The stopped worker does nothing more when it wakes up.
"""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.routing.ledger import keys
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until

NAMES = ("a", "b", "c", "d")
JOBS = 400
#: Term of the runner in seconds. A busy machine lets a runner wait for longer than the half second of other tests.
TERM = 1.5
#: Seconds that each row takes which a pass writes. All rows take three terms.
SLOW = 3 * TERM / JOBS


@pytest.fixture
def workers(platform: Platform) -> dict[str, Process]:
    platform.environment["PLATFORM_RUNNER_TERM"] = str(TERM)
    return {name: platform.worker(name, cpus=1, pool="threads", slots=1) for name in NAMES}


def runner_of(platform: Platform) -> str:
    """Return the name of the worker that has the lease of the runner, or '' if no worker has it."""
    lease: Any = platform.redis.hgetall(keys.RUNNER)
    with platform.engine.connect() as connection:
        query = text("SELECT name FROM workers WHERE incarnation = :incarnation")
        name = connection.execute(query, {"incarnation": lease.get(b"incarnation", b"").decode()}).scalar()
    now = platform.redis.time()[0] * 1000
    return str(name or "") if int(lease.get(b"until", 0)) > now else ""


def brought_in_by(process: Process) -> int:
    """Return the number of scheduled jobs that a worker's duty has brought in, by its own log."""
    return sum(int(number) for line in process.lines for number in re.findall(r"duty due: due (\d+)", line))


def duties_of(process: Process) -> int:
    return sum("duty " in line and "duties" not in line for line in process.lines)


def slow_down(platform: Platform) -> None:
    """Make the write of each waiting row slow, as on a slow disk."""
    with platform.engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN PERFORM pg_sleep({SLOW}); RETURN NEW; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER slow BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.state = 'waiting') "
                "EXECUTE FUNCTION slow()"
            )
        )


def send_what_waits(submitter: Submitter) -> None:
    """Submit jobs that fit on no worker once they are due: only the duties write that they wait."""
    submitter.app.submit_many("tests.fixtures.tasks.add", [(1, 2)] * JOBS, cpus=99, countdown=0.5)


def waiting(platform: Platform) -> int:
    with platform.engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM jobs WHERE state = 'waiting'")).scalar_one())


def test_a_pass_longer_than_its_interval_and_the_term_is_one_worker_s(
    platform: Platform, submitter: Submitter, workers: dict[str, Process]
) -> None:
    slow_down(platform)
    runner = until(lambda: runner_of(platform), "one is elected")
    fence = platform.redis.hget(keys.RUNNER, "fence")
    send_what_waits(submitter)
    until(lambda: waiting(platform) == JOBS, lambda: f"all are written: {waiting(platform)}")
    until(lambda: brought_in_by(workers[runner]) >= JOBS, lambda: f"it says so: {brought_in_by(workers[runner])}")
    assert {name: brought_in_by(process) for name, process in workers.items()} == {
        name: JOBS if name == runner else 0 for name in NAMES
    }
    assert platform.redis.hget(keys.RUNNER, "fence") == fence
    assert sum(duties_of(process) > 0 for process in workers.values()) == 1


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "stopped"])
def test_another_worker_takes_over_and_the_old_one_does_nothing_more(
    platform: Platform, submitter: Submitter, workers: dict[str, Process], kill: bool
) -> None:
    first = until(lambda: runner_of(platform), "one is elected")
    old = workers[first]
    os.killpg(old.pid, signal.SIGKILL if kill else signal.SIGSTOP)
    second = until(
        lambda: runner if (runner := runner_of(platform)) not in ("", first) else "", "another one is elected"
    )
    late = submitter.send("tests.fixtures.tasks.add", 1, 2, countdown=0.5, queue="nobody")
    until(lambda: submitter.row(late).state == "waiting", "the new runner brings it in")
    if kill:
        return
    before = duties_of(old)
    old.process.send_signal(signal.SIGCONT)
    os.killpg(old.pid, signal.SIGCONT)
    old.wait_for("runs the duties no more")
    jobs = [submitter.send("tests.fixtures.tasks.add", 1, 2, countdown=0.3, queue="nobody") for _ in range(3)]
    until(lambda: {submitter.row(job).state for job in jobs} == {"waiting"}, "they are brought in")
    assert duties_of(old) == before
    assert runner_of(platform) == second


def test_a_runner_that_ends_gives_its_lease_back(platform: Platform, workers: dict[str, Process]) -> None:
    first = until(lambda: runner_of(platform), "one is elected")
    fence = int(platform.redis.hget(keys.RUNNER, "fence") or 0)
    assert workers[first].stop() == 0
    until(lambda: runner_of(platform) not in ("", first), "another one is elected")
    assert int(platform.redis.hget(keys.RUNNER, "fence") or 0) == fence + 1
