"""Limits by key with workers: never more bodies of a key at once than its limit, whatever dies meanwhile."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from celery import chord, group

from celery_capacity.platform.console.render import reasons
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.model.reasons import Reason
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks import limited


@pytest.fixture
def platform(platform: Platform) -> Platform:
    platform.environment["PLATFORM_IMPORTS"] = f"tests.fixtures.tasks,{limited.__name__}"
    return platform


def at_once(log: Path, customers: dict[str, int]) -> Counter[int]:
    """Return the most bodies of each customer that ran at once, as the bodies noted it.

    A job that starts again has lost its attempt before: its worker was killed, and no body of it runs.
    """
    running: set[str] = set()
    most: Counter[int] = Counter()
    for line in log.read_text(encoding="utf-8").splitlines():
        word, _, job = line.partition(" ")
        running.discard(job)
        if word == "start":
            running.add(job)
            for customer, number in Counter(customers[job] for job in running).items():
                most[customer] = max(most[customer], number)
    return most


def within(log: Path, customers: dict[str, int], limits: dict[int, int]) -> bool:
    """Return True if no more bodies of a customer ran at once than its limit. How many did depends on the machine."""
    return all(number <= limits[customer] for customer, number in at_once(log, customers).items())


def starts(log: Path) -> int:
    return log.read_text(encoding="utf-8").count("start") if log.exists() else 0


def all_succeed(submitter: Submitter, jobs: Iterable[str]) -> bool:
    return all(submitter.ended(job).state == "succeeded" for job in jobs)


def test_bodies_of_a_key_stay_within_its_limit(platform: Platform, submitter: Submitter, tmp_path: Path) -> None:
    for name in ("a", "b"):
        platform.worker(name, cpus=4, pool="threads", ready=False)
    log, limit = tmp_path / "log", {"customer:1": 2}
    jobs = {submitter.send(limited.work.name, str(log), 1, limit=limit): 1 for _ in range(20)}
    jobs |= {submitter.send(limited.work.name, str(log), 2, limit={"customer:2": 3}): 2 for _ in range(10)}
    assert all_succeed(submitter, jobs)
    assert within(log, jobs, {1: 2, 2: 3})
    assert {submitter.row(job).worker for job in jobs} <= {"a", "b"}


def test_limit_holds_after_a_worker_is_killed(platform: Platform, submitter: Submitter, tmp_path: Path) -> None:
    first = platform.worker("a", cpus=4, pool="threads")
    log = tmp_path / "log"
    jobs = {submitter.send(limited.work.name, str(log), 1, 0.3, limit={"customer:1": 2}): 1 for _ in range(8)}
    until(lambda: starts(log) >= 3, "the third body runs")
    first.signal(signal.SIGKILL)
    first.wait()
    platform.worker("b", cpus=4, pool="threads")
    assert all_succeed(submitter, jobs)
    assert at_once(log, jobs) == {1: 2}


def test_limit_holds_while_redis_is_emptied(platform: Platform, submitter: Submitter, tmp_path: Path) -> None:
    platform.worker("a", cpus=8, pool="threads")
    log = tmp_path / "log"
    jobs = {submitter.send(limited.work.name, str(log), 1, 0.2, limit={"customer:1": 2}): 1 for _ in range(10)}
    until(lambda: starts(log) >= 3, "the third body runs")
    platform.redis.flushdb()
    assert all_succeed(submitter, jobs)
    assert at_once(log, jobs) == {1: 2}


def test_retries_wait_for_their_key_again(platform: Platform, submitter: Submitter, tmp_path: Path) -> None:
    platform.worker("a", cpus=8, pool="threads")
    log = tmp_path / "log"
    jobs = {submitter.send(limited.work_again.name, str(log), 1, limit={"customer:1": 2}): 1 for _ in range(5)}
    assert all_succeed(submitter, jobs)
    assert (starts(log), within(log, jobs, {1: 2})) == (15, True)


def test_parts_of_a_chord_are_limited_by_a_declared_function(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    platform.worker("a", cpus=8, pool="threads")
    log, tasks = tmp_path / "log", submitter.app.tasks
    parts = group(tasks[limited.work.name].s(str(log), number % 2) for number in range(8))
    result = chord(parts)(tasks[limited.total.name].s())
    assert result.get(timeout=60) == 4
    customers = {part.id: number % 2 for number, part in enumerate(result.parent.results)}
    assert max(at_once(log, customers).values()) <= 2


def test_held_job_says_which_key_holds_it(platform: Platform, submitter: Submitter, tmp_path: Path) -> None:
    platform.worker("a", cpus=8, pool="threads")
    log = tmp_path / "log"
    holder, *held = (submitter.send(limited.work.name, str(log), 1, 3, limit={"customer:1": 1}) for _ in range(3))
    with platform.engine.connect() as connection:
        why = explain(platform.redis, connection, held[1])
    assert why is not None and why.key is not None
    assert (why.why, why.key.key, why.key.limit, why.key.holders, why.key.place_in_line) == (
        Reason.KEY_LIMIT,
        "customer:1",
        1,
        (holder,),
        2,
    )
    assert f"at most 1 job at once, and {holder} holds it" in reasons(why)[0]
    cluster = platform.celery("cluster")
    assert "limit of key customer:1: 1 job holds it, 2 wait" in cluster.stdout
