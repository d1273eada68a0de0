"""The only Redis is ledger, broker and result backend, and is away for longer than every lease.

Work goes on from Postgres, and nothing is lost or done twice when Redis is back.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from sqlalchemy import text

from celery_capacity.platform.embedded import valkey
from celery_capacity.routing.database.authority import Authority, read_authority
from tests.faults.breaking.servers import Servers
from tests.faults.judging.watching import TASK, Oracle
from tests.fixtures.jobs.submitting import RESULT_WITHIN, Submitter
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.waiting import PATIENCE, until
from tests.tasks.lasting import Gate

ADD = "tests.fixtures.tasks.add"
FAIL = "tests.fixtures.tasks.fail"
LISTED = "tests.tasks.canvas.listed"
TOTAL = "tests.tasks.canvas.total"


pytestmark = pytest.mark.long


def authority(platform: Platform) -> Authority:
    with platform.engine.connect() as connection:
        return read_authority(connection)


def until_decides(platform: Platform, who: str) -> Authority:
    """Wait until the authority row names this store, and return the row."""
    until(lambda: authority(platform).authority == who, lambda: f"{who} decides: {authority(platform)}")
    return authority(platform)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_jobs_start_from_postgres_while_the_only_redis_is_away(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle, pool: Pool
) -> None:
    platform.worker("a", cpus=2, pool=pool)
    oracle.sends(submitter, 4)
    oracle.until_runs(4)
    servers.kill_redis()
    oracle.results_were_lost()
    oracle.sends(submitter, 4)
    until_decides(platform, "postgres")
    oracle.sends(submitter, 4)
    oracle.until_runs(12)
    servers.start_redis()
    oracle.whole_again("Redis was away")
    until_decides(platform, "ledger")
    oracle.sends(submitter, 4)
    oracle.assert_zeros()


@pytest.fixture
def without_redis(servers: Servers, platform: Platform, oracle: Oracle) -> Iterator[Platform]:
    """Yield a platform with one worker `a` of two CPUs while Postgres decides.

    At the end the ledger decides, and all counts are 0.
    """
    platform.worker("a", cpus=2)
    servers.kill_redis()
    until_decides(platform, "postgres")
    yield platform
    if servers.redis_is_away():
        servers.start_redis()
    oracle.whole_again("Redis was away")
    if any(process.alive for process in platform.processes):
        until_decides(platform, "ledger")
        oracle.assert_zeros()


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_worker_joins_and_works_though_redis_was_away_at_its_start(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle, pool: Pool
) -> None:
    servers.kill_redis()
    oracle.sends(submitter, 2)
    platform.worker("a", cpus=2, pool=pool)
    until_decides(platform, "postgres")
    oracle.sends(submitter, 4)
    oracle.until_runs(6)
    servers.start_redis()
    oracle.whole_again("Redis was away at the start")
    until_decides(platform, "ledger")
    oracle.sends(submitter, 4)
    oracle.assert_zeros()


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_told_to_end_a_worker_hands_back_what_has_not_started(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle, pool: Pool
) -> None:
    leaving, other = platform.worker("a", cpus=1, pool=pool), platform.worker("b", cpus=1)
    servers.kill_redis()
    until_decides(platform, "postgres")
    oracle.sends(submitter, 2, seconds=2.0)
    waiting = oracle.sends(submitter, 4)
    oracle.until_runs(2)
    leaving.signal(signal.SIGTERM)
    oracle.asked(leaving)
    assert leaving.wait() == 0
    assert oracle.runs() >= 2
    assert oracle.ends_of(list(oracle.values)) >= 1
    until(lambda: oracle.ends_of(waiting) == 4, "the other worker runs what is left")
    assert other.alive
    servers.start_redis()
    until_decides(platform, "ledger")
    oracle.assert_zeros()


@pytest.mark.parametrize("signum", [signal.SIGQUIT, signal.SIGKILL])
def test_broken_off_jobs_run_again_on_another_worker(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate, signum: signal.Signals
) -> None:
    leaving = platform.worker("a", cpus=2)
    servers.kill_redis()
    until_decides(platform, "postgres")
    jobs = oracle.sends(submitter, 2, seconds=gate)
    oracle.until_runs(2)
    oracle.asked(leaving)
    children = psutil.Process(leaving.pid).children()
    leaving.signal(signum)
    leaving.wait()
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert alive == []
    gate.open()
    platform.worker("b", cpus=2)
    until(lambda: all(submitter.row(job).state == "succeeded" for job in jobs), "both ran on the other worker")
    assert {submitter.row(job).worker for job in jobs} == {"b"}
    assert {submitter.row(job).losses for job in jobs} == ({0} if signum == signal.SIGQUIT else {1})
    servers.start_redis()
    until_decides(platform, "ledger")
    oracle.assert_zeros()


def test_results_are_read_from_rows_with_their_types_while_redis_is_away(
    without_redis: Platform, submitter: Submitter, servers: Servers
) -> None:
    value = submitter.send(ADD, 40, 2)
    failed = submitter.send("tests.fixtures.tasks.fail", "so it is")
    retried = submitter.send("tests.tasks.ends.again", 2)
    later = submitter.send(ADD, 1, 1, countdown=3600)
    assert submitter.result(later).state == "PENDING"
    revoked = submitter.send(ADD, 1, 1, countdown=3600)
    submitter.app.control.revoke(revoked)

    def all_ended() -> bool:
        ends = {value: "SUCCESS", failed: "FAILURE", revoked: "REVOKED"}
        return {job: submitter.result(job).state for job in ends} == ends

    for _ in ("away", "back"):
        assert submitter.value(value) == 42
        assert submitter.value(retried)["retries"] == 2
        with pytest.raises(ValueError, match="so it is"):
            submitter.value(failed)
        with pytest.raises(TaskRevokedError):
            submitter.value(revoked)
        # A Redis that is back has the results once they were delivered.
        until(all_ended, "the states are there")
        together = group(submitter.app.signature(ADD, (n, n)) for n in range(3)).apply_async()
        assert together.get(timeout=RESULT_WITHIN) == [0, 2, 4]
        if servers.redis_is_away():
            servers.start_redis()
            until_decides(without_redis, "ledger")
    submitter.app.control.revoke(later)


def test_waiting_for_a_result_outlasts_the_loss_and_the_return_of_redis(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    platform.worker("a", cpus=4)
    early, late = (oracle.send(submitter, seconds=seconds) for seconds in (2.0, 8.0))
    with ThreadPoolExecutor() as threads:
        values = [threads.submit(submitter.result(job).get, timeout=RESULT_WITHIN) for job in (early, late)]
        until(lambda: submitter.row(late).state == "running", "both run")
        servers.kill_redis()
        until_decides(platform, "postgres")
        assert values[0].result(RESULT_WITHIN) == 0
        servers.start_redis()
        assert values[1].result(RESULT_WITHIN) == 1
    until_decides(platform, "ledger")
    oracle.assert_zeros()


def test_chains_groups_and_chords_go_on_while_redis_is_away(
    without_redis: Platform, submitter: Submitter, servers: Servers
) -> None:
    add, total = submitter.app.signature(ADD), submitter.app.signature(TOTAL)

    def sums(*numbers: int) -> Any:
        return chord((add.clone((n, n)) for n in numbers), total.clone())

    chained = chain(add.clone((1, 2)), add.clone((3,)), add.clone((4,))).apply_async()
    simple = sums(*range(20)).apply_async()
    body_of_chain = chain(group(add.clone((n, 1)) for n in range(3)), total.clone(), add.clone((100,))).apply_async()
    nested = chord([sums(1, 2), sums(3, 4)], total.clone()).apply_async()
    replaced = submitter.app.signature("tests.tasks.canvas.becomes", kwargs={"canvas": sums(5, 6)}).apply_async()
    assert chained.get(timeout=RESULT_WITHIN) == 10
    assert simple.get(timeout=RESULT_WITHIN) == 380
    assert body_of_chain.get(timeout=RESULT_WITHIN) == 106
    assert nested.get(timeout=RESULT_WITHIN) == 20
    assert replaced.get(timeout=RESULT_WITHIN) == 22
    assert authority(without_redis).authority == "postgres"
    # Two chords: the first is under way when Redis comes back, the second fails, so that its body has no row.
    late = chord((add.clone((n, n), countdown=3.0 * n) for n in range(3)), total.clone()).apply_async()
    failed = chord([add.clone((1, 1)), submitter.app.signature(FAIL, ("no",))], total.clone()).apply_async()
    until(lambda: submitter.row(late.parent[0].id).state == "succeeded", "its first part has come")
    servers.start_redis()
    until_decides(without_redis, "ledger")
    assert late.get(timeout=RESULT_WITHIN) == 6
    with pytest.raises(ChordError):
        submitter.value(failed.id)
    assert sums(7, 8).apply_async().get(timeout=RESULT_WITHIN) == 30
    with without_redis.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM chords")).scalar_one() == 0


@pytest.mark.parametrize("data", ["empty", "with old data"])
def test_every_job_ends_once_while_redis_is_away_longer_than_each_lease(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle, data: str
) -> None:
    platform.worker("a", cpus=3)
    platform.worker("b", cpus=3, pool="threads")
    lost_after = platform.settings.lost_after
    long = oracle.send(submitter, seconds=lost_after + 4.0)
    with oracle.flow(submitter):
        oracle.until_runs(20)
        if data != "empty":
            with servers.admin() as admin:
                admin.save()
        servers.kill_redis()
        oracle.results_were_lost()
        away = time.monotonic()
        until_decides(platform, "postgres")
        until(lambda: time.monotonic() - away > 1.5 * lost_after, "each lease is over")
        oracle.until_more(20)
        servers.start_redis()
        oracle.whole_again(f"Redis was away, back {data}")
        until_decides(platform, "ledger")
        oracle.until_more(20)
    oracle.assert_zeros()
    assert submitter.outcomes(long) == ["succeeded"]


def test_jobs_start_while_the_only_redis_is_stopped_and_answers_nobody(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    platform.worker("a", cpus=2)
    platform.worker("b", cpus=2, pool="threads")
    oracle.sends(submitter, 4)
    oracle.until_runs(4)
    server = valkey.running(servers.redis_folder)
    assert server is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        until_decides(platform, "postgres")
        oracle.sends(submitter, 10)
        oracle.until_runs(14)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    oracle.whole_again("Redis was stopped")
    until_decides(platform, "ledger")
    oracle.sends(submitter, 4)
    oracle.assert_zeros()


def test_half_written_job_reaches_its_process_though_the_broker_goes(
    servers: Servers, platform: Platform, submitter: Submitter
) -> None:
    """The pool's process reads nothing, so only a part of a large job fits into the pipe to it."""
    worker = platform.worker("a", cpus=1)
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3
    (child,) = psutil.Process(worker.pid).children()
    child.suspend()
    large = submitter.send(LISTED, "x" * 500_000)
    submitter.until(large, "running")
    servers.kill_redis()
    worker.wait_for("the pool goes on meanwhile")
    child.resume()
    assert submitter.ended(large).state == "succeeded"
    assert submitter.value(large) == ["x" * 500_000]
    servers.start_redis()
    until_decides(platform, "ledger")
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3


def test_time_limits_hold_for_jobs_that_started_without_redis(
    platform: Platform, submitter: Submitter, servers: Servers, tmp_path: Path
) -> None:
    platform.worker("a", cpus=2)
    servers.kill_redis()
    until_decides(platform, "postgres")
    slow = submitter.send(TASK, str(tmp_path / "slow"), 1, 60.0, 1000, time_limit=1)
    assert submitter.ended(slow).state == "failed"
    with pytest.raises(TimeLimitExceeded):
        submitter.value(slow)
    servers.start_redis()
    until_decides(platform, "ledger")


def test_chord_goes_on_when_redis_is_back_with_its_data(
    servers: Servers, platform: Platform, submitter: Submitter
) -> None:
    platform.worker("a", cpus=2)
    add, total = submitter.app.signature(ADD), submitter.app.signature(TOTAL)
    made = chord((add.clone((n, n), countdown=1.5 * n) for n in range(4)), total.clone()).apply_async()
    until(lambda: submitter.row(made.parent[0].id).state == "succeeded", "its first part has come")
    with servers.admin() as admin:
        admin.save()
    servers.kill_redis()
    until_decides(platform, "postgres")
    until(lambda: all(submitter.row(part.id).state == "succeeded" for part in made.parent), "all parts have ended")
    assert submitter.row(made.id) is None
    servers.start_redis()
    assert made.get(timeout=RESULT_WITHIN) == 12
    until_decides(platform, "ledger")
