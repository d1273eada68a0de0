"""The invariants are found to hold while work moves, and each kind of wrong book is found and named."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import redis

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.inspect import audit, verify
from celery_capacity.routing.ledger import keys
from tests.fixtures.stores.staged import Stage

#: Seconds for which a violation must stay; nothing else moves in these tests.
BRIEFLY = 0.2

pytestmark = pytest.mark.leaves(
    *("I1", "I3", "I4", "I6", "keys"), because="a test damages a store, and `verify` has to see it", sometimes=True
)


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000, licence=2)
    return stage


def _check(stage: Stage, at_rest: bool | None = None) -> verify.Report:
    return verify.check(stage.engine, stage.redis, at_rest, patience=BRIEFLY)


def _violations(stage: Stage, name: str, at_rest: bool | None = None) -> str:
    """Return the violations of one invariant, as text."""
    verdict_of_name = {verdict.name: verdict for verdict in _check(stage, at_rest).verdicts}[name]
    assert verdict_of_name.holds is False, "not found"
    return "\n".join(verdict_of_name.detail)


def test_an_empty_platform_is_at_rest_and_all_hold(stage: Stage) -> None:
    report = _check(stage)
    assert (report.at_rest, report.lines()) == (True, [])
    assert [(v.name, v.holds) for v in report.verdicts] == [(n, True) for n in ("I1", "I2", "I3", "I4", "I6")]


def test_while_work_runs_what_holds_at_rest_is_not_judged(stage: Stage) -> None:
    running = stage.submit(cpus=3000, licence=1)
    stage.start(running)
    stage.submit(cpus=2000)
    report = _check(stage)
    assert (report.at_rest, report.lines(), report.holds) == (False, [], True)
    assert [v.name for v in report.verdicts if v.holds is None] == ["I2", "I3"]


def test_a_whole_life_of_jobs_holds_at_every_step(stage: Stage) -> None:
    jobs = [stage.submit(cpus=2500) for _ in range(3)]
    for job in jobs:
        assert _check(stage).lines() == []
        stage.start(job)
        assert _check(stage).lines() == []
        stage.end(job)
    report = _check(stage)
    assert (report.at_rest, report.lines()) == (True, [])


def test_suspicion_of_a_slow_reading_is_read_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    read, held = audit.read_ledger, stage.redis.hset(keys.book("a"), "a.cpus", 1000)
    readings: list[audit.LedgerReading] = []

    def read_slowly(client: redis.Redis, progress: audit.Progress | None) -> audit.LedgerReading:
        readings.append(read(client, progress))
        if len(readings) == 1:
            time.sleep(2 * BRIEFLY)
            stage.redis.hset(keys.book("a"), "a.cpus", 0)
        return readings[-1]

    monkeypatch.setattr(audit, "read_ledger", read_slowly)
    assert _check(stage).lines() == []
    assert (held, len(readings)) == (0, 2)


def test_transitions_that_postgres_does_not_have_yet_are_no_difference(stage: Stage) -> None:
    job = stage.submit(cpus=2500, applied=False)
    assert _check(stage).lines() == []
    stage.apply()
    stage.end(job, applied=False)
    assert _check(stage, at_rest=False).lines() == []


def test_a_handed_back_job_is_one_job_with_two_attempts(stage: Stage) -> None:
    job = stage.submit(cpus=2500)
    stage.end(job, "handed_back")
    assert stage.row(job).attempt == 2
    assert _check(stage).lines() == []


def test_jobs_that_come_and_go_meanwhile_are_not_violations(stage: Stage) -> None:
    enough = Event()

    def work() -> int:
        done = 0
        while not enough.is_set():
            job = stage.submit(cpus=1000)
            stage.start(job)
            stage.end(job)
            done += 1
        return done

    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        try:
            for _ in range(10):
                assert verify.check(stage.engine, stage.redis).lines() == []
        finally:
            enough.set()
        assert working.result() > 10


def test_at_rest_asked_for_a_job_that_waits_is_a_violation(stage: Stage) -> None:
    job = stage.submit(cpus=9000)
    assert f"job {job} is waiting" in _violations(stage, "I2", at_rest=True)
    assert "1 jobs wait under cpus=9000" in _violations(stage, "I3", at_rest=True)


def test_a_scheduled_job_is_rest_until_it_is_due(stage: Stage) -> None:
    job = stage.insert({"cpus": 1000})
    stage.sql("UPDATE jobs SET state = 'scheduled', due_at = now() + interval '1 h'")
    assert _check(stage).at_rest
    stage.sql("UPDATE jobs SET due_at = now()")
    assert not _check(stage).at_rest
    assert stage.row(job).state == "scheduled"


def test_more_allocated_than_there_is_violates_i1(stage: Stage) -> None:
    stage.submit(cpus=4000)
    stage.redis.hset(keys.book("a"), "c.cpus", 3000)
    assert "worker a has 4000 of 3000 cpus allocated" in _violations(stage, "I1")


def test_a_book_that_is_not_the_sum_of_what_is_held_violates_i1(stage: Stage) -> None:
    stage.submit(cpus=1000)
    stage.redis.hincrby(keys.book("a"), "a.memory", 5)
    assert "worker a has 5 memory allocated, its jobs hold 0" in _violations(stage, "I1")


def test_a_held_job_without_a_key_violates_i1(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.redis.delete(keys.job(job))
    assert f"worker a holds {job} 1.1" in _violations(stage, "I1")


def test_a_leaked_allocation_at_rest_violates_i3_and_i1(stage: Stage) -> None:
    stage.redis.hincrby(keys.book("a"), "a.cpus", 1000)
    assert "worker a has 1000 cpus allocated" in _violations(stage, "I3")
    assert "its jobs hold 0" in _violations(stage, "I1")


@pytest.mark.parametrize(
    ("meddling", "said"),
    [
        (
            "INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation) VALUES (:job, 0, 0, 'a', 'x')",
            "more than one open attempt: 0.0, 1.1",
        ),
        (
            "INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, ended_at)"
            " VALUES (:job, 0, 1, 'a', 'x', now())",
            "attempt 1.1 after a token that is not older, 0.1",
        ),
        ("UPDATE jobs SET attempt = 0 WHERE id = :job", "attempt 1.1, newer than its row, 1.0"),
        (
            "UPDATE jobs SET state = 'failed', finished_at = now() WHERE id = :job",
            "is failed, and its attempt 1.1 is open",
        ),
        (
            "WITH ended AS (UPDATE attempts SET ended_at = now(), outcome = 'succeeded' WHERE job_id = :job)"
            " UPDATE jobs SET state = 'failed', step = 9, finished_at = now() WHERE id = :job",
            "is failed, and its last attempt 1.1 ended as succeeded",
        ),
    ],
)
def test_attempts_that_contradict_violate_i4(stage: Stage, meddling: str, said: str) -> None:
    job = stage.submit(cpus=1000)
    stage.sql(meddling, job=job)
    assert f"job {job} " in _violations(stage, "I4")
    assert said in _violations(stage, "I4")


def test_a_job_held_twice_violates_i4(stage: Stage) -> None:
    stage.worker("b", cpus=4000)
    job = stage.submit(cpus=1000)
    stage.redis.hset(keys.held("b"), job, "1.1")
    assert f"job {job} is held by a, b" in _violations(stage, "I4")


def test_a_job_that_only_one_store_holds_violates_i6(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.sql("UPDATE jobs SET state = 'waiting'")
    violations = _violations(stage, "I6")
    assert f"job {job} is held by a 1.1 in Redis, nothing in Postgres" in violations
    assert f"job {job} waits as nothing in Redis, cpus=1000,slots=1 in Postgres" in violations


def test_a_waiting_job_that_the_ledger_forgot_violates_i6(stage: Stage) -> None:
    job = stage.submit(cpus=9000)
    stage.redis.delete(keys.wait("cpus=9000,slots=1"), keys.job(job))
    violations = _violations(stage, "I6")
    assert f"job {job} waits as nothing in Redis" in violations
    assert "shape cpus=9000,slots=1 begins at None" in violations


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("SET", "resource:allocated_cpus", "7"), "resource:allocated_cpus is 7, ledger:allocated 1000"),
        (("SET", "ledger:allocated", "7"), "ledger:allocated is 7, the books have 1000"),
        (("ZADD", "ledger:free", "7", "a"), "worker a has 3000 free and stands as 7 in the index"),
        (("ZADD", "ledger:unclaimed", "7", "none"), "job none is to be delivered again"),
        (("SET", "ledger:junk", "7"), "key ledger:junk is of no known family"),
        (("SET", "ledger:job:old", "ended\n"), "key ledger:job:old has no expiry"),
        (("EXPIRE", "ledger:book:a", "100"), "key ledger:book:a has an expiry"),
        (("PERSIST", "worker:a"), "key worker:a has no expiry"),
    ],
)
def test_a_ledger_that_contradicts_itself_violates_i6(stage: Stage, command: tuple[str, ...], said: str) -> None:
    stage.submit(cpus=1000)
    execute: Any = stage.redis.execute_command
    execute(*command)
    assert said in _violations(stage, "I6")


def test_a_cold_ledger_violates_i6_only_where_jobs_need_it(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.redis.flushdb()
    assert "the ledger is cold, and 1 jobs are not ended" in _violations(stage, "I6")
    stage.sql("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = :job", job=job)
    stage.sql("UPDATE attempts SET ended_at = now()")
    assert _check(stage).lines() == []


def test_a_verdict_shows_ten_violations_and_counts_the_rest(stage: Stage) -> None:
    for number in range(12):
        stage.redis.set(f"ledger:junk{number}", "7")
    (verdict,) = (v for v in _check(stage).verdicts if v.name == "I6")
    assert (len(verdict.detail), verdict.violations) == (10, 12)


def test_a_store_that_does_not_answer_is_not_judged(stage: Stage) -> None:
    with pytest.raises(StoreUnavailable, match="Redis does not answer"):
        verify.check(stage.engine, redis.Redis(port=1))
