"""Concurrency with gevent: thousands of jobs wait in one process, and none can stop the process's own threads."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskError, TaskRevokedError, TimeLimitExceeded

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.ledger import keys
from tests.features.workers.test_pools import control, hold, running, slots
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks import greenlets

#: Jobs that wait at once.
MANY = 200
#: A short lease, in seconds. `scaled` would take the jobs of `green` back a second after its end.
LEASE = 4.0
SHORT_LEASE = {"PLATFORM_WORKER_TTL": str(LEASE), "PLATFORM_LOST_AFTER": str(LEASE + 1)}


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield two workers: `green` has one CPU and places for many jobs, `scaled` has one to three places.

    The named resources of their jobs tell them apart.
    """
    with standing_platform(server_pair, tmp_path_factory.mktemp("greenlets"), "tests.tasks.greenlets") as started:
        started.environment.update(SHORT_LEASE)
        started.worker("green", 1, "gevent", slots=MANY, ready=False, PLATFORM_RESOURCES=f"green={MANY}")
        started.worker("scaled", 8, "gevent", arguments=("--autoscale", "3,1"), PLATFORM_RESOURCES="scaled=100")
        started.processes[0].wait_for(" ready.")
        yield started


def send(task: Any, *args: Any, **options: Any) -> Any:
    """Send a job that `green` runs beside all others, and return its result."""
    return task.apply_async(args, **{"cpus": 0.005, "resources": {"green": 1}, **options})


def test_many_jobs_that_wait_run_at_once_on_one_cpu(platform: Platform, submitter: Submitter) -> None:
    sent = [send(greenlets.napping, "naps") for _ in range(MANY)]
    assert len({tasks.started(platform.redis, "naps") for _ in sent}) == MANY
    assert running(submitter, [result.id for result in sent]) == MANY
    assert (submitter.allocated_cpus(), submitter.view("green")["slots"]) == ("1", str(MANY))
    # There is no room for another job.
    more = send(greenlets.napping, "naps")
    submitter.until(more.id, "waiting")
    platform.redis.set("naps:over", "")
    for result in [*sent, more]:
        assert result.get(timeout=60) >= 0
    until(lambda: submitter.allocated_cpus() == "0", "all is released")
    rows = [submitter.row(result.id) for result in sent]
    assert {(row.state, row.attempt, row.losses) for row in rows} == {("succeeded", 1, 0)}


def test_greenlets_that_wait_for_a_job_stop_no_others(platform: Platform, submitter: Submitter) -> None:
    held = send(tasks.hold, "awaited")
    tasks.started(platform.redis, "awaited")
    waiting = [send(greenlets.awaiting, held.id) for _ in range(3)]
    ids = [result.id for result in waiting]
    until(lambda: running(submitter, ids) == 3, "three jobs wait for one")
    assert send(tasks.add, 1, 2).get(timeout=60) == 3
    tasks.let_go(platform.redis, "awaited")
    assert [result.get(timeout=60) for result in waiting] == ["succeeded"] * 3


def test_greenlet_that_computes_beyond_a_lease_costs_its_worker_nothing(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    over = tmp_path / "over"
    napping = send(greenlets.napping, "beside")
    computing = send(greenlets.computing, "busy", str(over), cpus=0.5)
    assert tasks.started(platform.redis, "busy")[0] == computing.id

    def lease() -> int:
        return int(platform.redis.hget(keys.book("green"), "lease") or 0)

    first = lease()
    while (now := lease()) < first + 1.5 * LEASE * 1000:
        assert platform.redis.exists(keys.view("green"))
        until(lambda: lease() > now, "the lease is renewed", LEASE)
    # The worker takes over admitted jobs meanwhile. They begin when the greenlet gives way.
    after = send(tasks.add, 1, 2)
    submitter.until(after.id, "running")
    over.touch()
    assert after.get(timeout=60) == 3
    platform.redis.set("beside:over", "")
    assert napping.get(timeout=60) > LEASE
    for result in (napping, computing, after):
        row = submitter.ended(result.id)
        assert (row.state, row.attempt, row.losses) == ("succeeded", 1, 0)
    assert not any("registered again" in line for line in platform.processes[0].lines)


def test_the_time_limit_ends_a_job_that_waits_and_the_soft_one_does_not(
    platform: Platform, submitter: Submitter
) -> None:
    limited = send(greenlets.tidy, "limited", time_limit=1)
    soft = send(greenlets.tidy, "soft", soft_time_limit=1)
    for gate in ("soft", "limited"):
        tasks.started(platform.redis, gate)
    with pytest.raises(TimeLimitExceeded):
        limited.get(timeout=60)
    row = submitter.ended(limited.id)
    assert (row.state, row.attempt, row.error) == ("failed", 1, "TimeLimitExceeded(1)")
    assert left(platform, "limited") == limited.id
    assert submitter.row(soft.id).state == "running"
    tasks.let_go(platform.redis, "soft")
    assert soft.get(timeout=60) is None


def left(platform: Platform, gate: str) -> str:
    """Return the next job that left a gate."""
    popped: Any = platform.redis.blpop([f"{gate}:left"], tasks.MAX_SECONDS)
    return str(popped[1].decode())


def test_a_revoke_with_terminate_ends_the_greenlet_of_a_job(platform: Platform, submitter: Submitter) -> None:
    stays, ended = (send(greenlets.tidy, gate) for gate in ("stays", "ended"))
    for gate in ("stays", "ended"):
        tasks.started(platform.redis, gate)
    inspected = submitter.app.control.inspect(timeout=60, limit=2).active()
    (active,) = (jobs for name, jobs in inspected.items() if name.startswith("green@"))
    assert {task["id"] for task in active} == {stays.id, ended.id}
    ended.revoke(terminate=True)
    with pytest.raises(TaskRevokedError, match="terminated"):
        ended.get(timeout=60)
    row = submitter.ended(ended.id)
    assert (row.state, row.attempt, row.losses) == ("cancelled", 1, 0)
    assert left(platform, "ended") == ended.id
    # No other job was in the terminated greenlet.
    assert submitter.row(stays.id).state == "running"
    tasks.let_go(platform.redis, "stays")
    assert stays.get(timeout=60) is None
    until(lambda: submitter.allocated_cpus() == "0", "all is released")


def test_a_job_whose_greenlet_is_killed_by_somebody_else_has_failed(platform: Platform, submitter: Submitter) -> None:
    killed = send(greenlets.killing_itself)
    with pytest.raises(TaskError, match="was killed"):
        killed.get(timeout=60)
    assert submitter.ended(killed.id).state == "failed"
    # The killed job's place is free again: jobs wait for nothing.
    assert send(tasks.add, 1, 2).get(timeout=60) == 3


def test_greenlets_that_start_programs_spare_the_worker_s_connections(platform: Platform, submitter: Submitter) -> None:
    sent = [send(greenlets.asking_a_program, f"word{number}") for number in range(20)]
    assert [result.get(timeout=60) for result in sent] == [f"word{number}\n" for number in range(20)]
    assert send(tasks.add, 1, 2).get(timeout=60) == 3


def test_jobs_that_send_jobs_do_so_beside_each_other(platform: Platform, submitter: Submitter) -> None:
    senders = [send(greenlets.sending, 20) for _ in range(10)]
    sent = [job for result in senders for job in result.get(timeout=60)]
    assert sorted(submitter.value(job) for job in sent) == sorted([*range(1, 21)] * 10)
    until(lambda: submitter.allocated_cpus() == "0", "all is released")


def test_a_pool_of_greenlets_that_grows_and_shrinks_publishes_its_size(
    platform: Platform, submitter: Submitter
) -> None:
    assert "ok" in control(submitter, "green", "pool_grow", n=5)
    until(lambda: slots(submitter, "green") == MANY + 5, "it publishes more")
    assert "ok" in control(submitter, "green", "pool_shrink", n=5)
    until(lambda: slots(submitter, "green") == MANY, "it publishes what it did")


def test_a_pool_of_greenlets_that_scales_itself_publishes_its_largest_size(
    platform: Platform, submitter: Submitter
) -> None:
    assert slots(submitter, "scaled") == 3
    jobs = hold(submitter, "scaled", 5)
    for _ in range(3):
        tasks.started(platform.redis, "scaled")
    assert running(submitter, jobs) == 3
    assert "ok" in control(submitter, "scaled", "autoscale", max=4, min=2)
    tasks.started(platform.redis, "scaled")
    until(lambda: slots(submitter, "scaled") == 4, "it publishes four")
    tasks.let_go(platform.redis, "scaled", 5)
    rows = [submitter.ended(job) for job in jobs]
    assert [(row.state, row.attempt) for row in rows] == [("succeeded", 1)] * 5


def test_worker_of_greenlets_loses_jobs_when_killed_and_ends_them_on_stop(
    platform: Platform, submitter: Submitter
) -> None:
    """Other ends of a worker, and their effects on its jobs, are in tests/faults."""
    killed = platform.worker("mortal", 1, "gevent", slots=2, PLATFORM_RESOURCES="mortal=2")
    (job,) = hold(submitter, "mortal", 1)
    assert tasks.started(platform.redis, "mortal") == (job, killed.pid)
    killed.kill()
    stopped = platform.worker("mortal", 1, "gevent", slots=2, PLATFORM_RESOURCES="mortal=2")
    assert tasks.started(platform.redis, "mortal") == (job, stopped.pid)
    stopped.signal(signal.SIGTERM)
    until(lambda: submitter.view("mortal")["status"] == "draining", "it drains")
    tasks.let_go(platform.redis, "mortal")
    assert stopped.wait(60) == 0
    assert submitter.ended(job).state == "succeeded"
    assert submitter.outcomes(job) == ["lost", "succeeded"]
    assert not any("Traceback" in line for line in stopped.lines), stopped.tail()
