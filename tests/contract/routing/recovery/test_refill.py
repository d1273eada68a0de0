"""The ledger holds the head of the backlog. Other jobs stay in Postgres, and start in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.errors import BacklogFull
from celery_capacity.routing.inspect import backlog_limit, overview, verify, waiting
from celery_capacity.routing.inspect.backlog_limit import BacklogLimit
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.ledger.replies import CancelVerdict, LedgerClosed, SubmitVerdict
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import rebuild, reconcile, refill
from celery_capacity.routing.store import backlog
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.client import priorities
from tests.fixtures.stores.headed import LEAST, SHAPE, Head


@pytest.fixture
def stage(short_head: None, engine: Engine, settings: Settings) -> Iterator[Head]:
    stage = Head(engine, replace(settings, max_ledger_backlog=1))
    yield stage
    stage.close()


def test_job_behind_a_full_head_stays_in_postgres(stage: Head) -> None:
    jobs = [stage.add() for _ in range(5)]
    assert stage.filed() == jobs[:LEAST]
    assert stage.ledger.borders() == {SHAPE: order(0, stage.row(jobs[LEAST]).seq)}
    assert stage.refill() == {"marked": 3, "fetched": 0}
    rows = [stage.row(job) for job in jobs]
    assert [(row.state, row.behind) for row in rows] == [("waiting", None)] * LEAST + [("waiting", SHAPE)] * 3
    assert stage.redis.exists(*map(keys.job, jobs[LEAST:])) == 0
    assert stage.redis.hgetall(keys.STAYING) == {SHAPE.encode(): b"3"}
    assert stage.refill() == {"marked": 0, "fetched": 0}


def test_jobs_start_in_order_across_the_border(stage: Head) -> None:
    jobs = [stage.add() for _ in range(9)]
    stage.refill()
    stage.worker("w", cpus=1000)
    stage.apply()
    stage.refill()
    assert stage.drain() == jobs
    assert not stage.ledger.borders()
    assert stage.redis.exists(keys.LOW, keys.STAYING, keys.KEYS["left"]) == 0
    assert stage.redis.hget(keys.EPOCH, "stay") is None
    assert stage.redis.hget(keys.EPOCH, "waiting") == b"0"


def test_job_that_comes_later_waits_behind_those_in_postgres(stage: Head) -> None:
    jobs = [stage.add() for _ in range(LEAST + 1)]
    stage.worker("w", cpus=1000 * LEAST)
    stage.apply()
    # The head is empty, and the worker has room again before anything was fetched.
    for job in jobs[:LEAST]:
        stage.start(job)
        stage.end(job)
    late = stage.add()
    assert stage.held() == []
    stage.refill()
    assert stage.held() == sorted([jobs[LEAST], late])


def test_jobs_of_higher_priorities_bring_no_others_with_them(stage: Head) -> None:
    low = [stage.add() for _ in range(LEAST + 20)]
    high = []
    for priority in range(1, 6):
        high.append(stage.add(priority))
        stage.refill()
    assert stage.filed() == [*reversed(high), *low[:LEAST]]
    stage.worker("w", cpus=1000)
    stage.apply()
    assert stage.drain() == [*reversed(high), *low]


def test_heads_share_the_limit_while_all_wait_for_others(short_head: None, engine: Engine, settings: Settings) -> None:
    stage = Head(engine, replace(settings, max_ledger_backlog=4 * LEAST))
    for cpus in (1000, 2000) * 2 * LEAST:
        stage.add(cpus=cpus)
    for cpus in (1000, 2000):
        stage.add(9, cpus)
    assert stage.redis.zcard(keys.SHAPES) == 0
    assert [jobs for jobs, _ in stage.ledger.begin_refill().values()] == [2 * LEAST] * 2
    stage.close()


def test_higher_priority_starts_before_the_jobs_of_a_full_head(stage: Head) -> None:
    low = [stage.add() for _ in range(LEAST + 1)]
    high = stage.add(priority=5)
    assert stage.filed() == low[:LEAST]
    stage.worker("w", cpus=1000)
    assert stage.held() == []  # the first of all stays in Postgres, and nothing overtakes it
    stage.refill()
    assert verify.check(stage.engine, stage.redis, at_rest=False, patience=0).lines() == []
    assert stage.drain() == [high, *low]


def test_job_that_stays_in_postgres_is_news_for_listeners(stage: Head) -> None:
    client: Any = stage.redis
    listener = client.pubsub()
    listener.psubscribe(f"{keys.KEYS['job']}*")
    jobs = [stage.add() for _ in range(LEAST + 1)]
    messages: list[tuple[str, bytes]] = []
    while len(messages) < len(jobs):
        message = listener.get_message(ignore_subscribe_messages=True, timeout=10)
        if message is not None:
            messages.append((message["channel"].decode(), message["data"]))
    listener.close()
    assert [channel for channel, _ in messages] == [keys.job(job) for job in jobs]
    assert [data == b"" for _, data in messages] == [False] * LEAST + [True]


def test_waiting_job_that_runs_low_is_asked_for_once(stage: Head) -> None:
    client: Any = stage.redis
    listener = client.pubsub()
    listener.subscribe(keys.LOW)
    jobs = [stage.add() for _ in range(6)]
    stage.refill()
    stage.worker("w", cpus=1000)
    stage.apply()
    heard = [message for _ in range(9) if (message := listener.get_message(timeout=0.05))]
    assert [message["data"] for message in heard if message["type"] == "message"] == [SHAPE.encode()]
    assert stage.refill()["fetched"] == 1
    listener.close()
    assert stage.filed() == jobs[1 : 1 + LEAST]


@pytest.mark.parametrize("end", [State.CANCELLED, State.EXPIRED])
def test_job_that_stays_in_postgres_ends_there(stage: Head, end: State) -> None:
    jobs = [stage.add() for _ in range(LEAST + 2)]
    stage.refill()
    assert stage.ledger.cancel(jobs[LEAST], end, "over").verdict is CancelVerdict.MISSING
    with stage.engine.connect() as connection:
        assert backlog.end_unfiled(connection, jobs[LEAST], end)
    stage.worker("w", cpus=1000)
    stage.apply()
    stage.refill()
    assert stage.drain() == [*jobs[:LEAST], jobs[LEAST + 1]]
    assert stage.row(jobs[LEAST]).state == end


def test_revoked_job_that_stays_in_postgres_is_not_fetched(stage: Head) -> None:
    jobs = [stage.add() for _ in range(LEAST + 2)]
    stage.refill()
    stage.sql("UPDATE jobs SET revoked_at = now() WHERE id = :id", id=jobs[LEAST])
    stage.worker("w", cpus=1000)
    stage.apply()
    stage.refill()
    assert stage.drain() == [*jobs[:LEAST], jobs[LEAST + 1]]
    assert stage.row(jobs[LEAST]).state == State.WAITING


def test_job_left_after_the_rows_were_read_keeps_its_place(stage: Head) -> None:
    jobs = [stage.add() for _ in range(LEAST + 1)]
    stage.ledger.begin_refill()
    late = stage.add()
    with stage.engine.connect() as connection:
        rows = backlog.these(connection, [jobs[LEAST]])
    # The caller read that no other job stays in Postgres, which is true no more.
    stage.ledger.refill(SHAPE, None, [row.submission() for row in rows])
    assert stage.ledger.borders() == {SHAPE: order(0, stage.row(late).seq)}
    assert stage.filed() == jobs


def test_process_that_dies_while_it_fetches_loses_no_job(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [stage.add() for _ in range(LEAST + 3)]
    stage.refill()
    stage.worker("w", cpus=1000)
    stage.apply()

    def dies(*_: object) -> None:
        raise LedgerClosed(None)

    with monkeypatch.context() as patch:
        patch.setattr(stage.ledger, "refill_heads", dies)
        with pytest.raises(LedgerClosed):
            stage.refill()
    assert stage.row(jobs[LEAST]).state == State.ACCEPTED
    stage.refill()
    assert stage.drain() == jobs


def test_rows_that_come_too_late_are_overtaken_by_none(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refill, "CHUNK", 1)
    stage.worker("w", cpus=1000)
    jobs = [stage.add() for _ in range(LEAST + 6)]
    stage.apply()
    stage.refill()
    for _ in range(LEAST):
        (held,) = stage.held()
        stage.start(held)
        stage.end(held)
    refill_heads, calls = stage.ledger.refill_heads, list[Any]()

    def is_late_at_first(heads: Any) -> list[int | None]:
        calls.append(heads)
        return [None] * len(heads) if len(calls) == 1 else refill_heads(heads)

    with monkeypatch.context() as patch:
        patch.setattr(stage.ledger, "refill_heads", is_late_at_first)
        stage.refill()
    assert [stage.row(job).state for job in jobs].count(State.ACCEPTED) == LEAST, "none of them was brought in"
    stage.refill()
    assert stage.drain() == jobs[LEAST:]


def test_jobs_are_fetched_before_all_rows_are_marked(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refill, "MARK_CHUNK", 2)
    monkeypatch.setattr(refill, "MARK_MOST", 2)
    monkeypatch.setattr(refill, "SECONDS", 0)
    jobs = [stage.add() for _ in range(LEAST + 9)]
    stage.worker("w", cpus=1000)
    stage.apply()
    assert stage.refill() == {"marked": 2, "fetched": 1}
    urgent = stage.add(priority=9)
    assert stage.drain()[1:] == [urgent, *jobs[1:]]


def test_reconcile_takes_jobs_in_postgres_for_no_drift(stage: Head) -> None:
    for _ in range(LEAST + 3):
        stage.add()
    stage.refill()
    assert reconcile.reconcile(stage.engine, stage.ledger).drift == 0
    assert verify.check(stage.engine, stage.redis, at_rest=False, patience=0).lines() == []
    assert stage.staying() == {SHAPE: 3}
    assert stage.redis.hgetall(keys.STAYING) == {SHAPE.encode(): b"3"}


def test_reconcile_restores_lost_borders_and_numbers(stage: Head) -> None:
    jobs = [stage.add() for _ in range(LEAST + 3)]
    stage.refill()
    stage.redis.delete(keys.BORDER, keys.STAYING)
    stage.redis.hset(keys.EPOCH, "waiting", 70)
    reconcile.reconcile(stage.engine, stage.ledger)
    assert stage.ledger.borders() == {SHAPE: order(0, stage.row(jobs[LEAST]).seq)}
    assert stage.redis.hget(keys.EPOCH, "waiting") == str(LEAST).encode()
    stage.worker("w", cpus=1000)
    stage.apply()
    stage.refill()
    assert stage.drain() == jobs


def test_rebuild_files_the_heads_alone_and_keeps_the_order(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [stage.add() for _ in range(LEAST + 3)]
    stage.refill()
    # Not marked yet: Postgres does not know that it stays there.
    jobs.append(stage.add())
    stage.redis.flushdb()
    assert rebuild.open_if_cold(stage.engine, stage.ledger) is not None
    with stage.engine.connect() as connection:
        stage.ledger.epoch = read_authority(connection).epoch
    stage.apply()
    assert stage.filed() == jobs[:LEAST]
    stage.refill()
    assert stage.staying() == {SHAPE: 4}
    stage.worker("w", cpus=1000)
    stage.apply()
    stage.refill()
    assert stage.drain() == jobs


def test_rebuild_leaves_a_backlog_of_before_in_postgres(stage: Head) -> None:
    jobs = [stage.add() for _ in range(LEAST)]
    more = [stage.insert({"cpus": 1000}) for _ in range(4)]
    stage.sql("UPDATE jobs SET state = 'waiting' WHERE id = ANY(:ids)", ids=more)  # as without a limit
    stage.redis.flushdb()
    assert rebuild.open_if_cold(stage.engine, stage.ledger) is not None
    assert stage.filed() == jobs
    assert stage.staying() == {SHAPE: 4}


def test_few_jobs_of_each_shape_wait_in_a_ledger_without_memory(stage: Head) -> None:
    roomy = Head(stage.engine, replace(stage.settings, max_ledger_backlog=1000))
    roomy.ledger.set_tight(True)
    jobs = [roomy.add() for _ in range(LEAST + 2)]
    assert roomy.filed() == jobs[:LEAST]
    roomy.ledger.set_tight(False)
    roomy.ledger.find_low()
    roomy.refill()
    assert roomy.filed() == jobs
    roomy.close()


def test_jobs_that_nobody_has_marked_are_counted_by_postgres(stage: Head) -> None:
    """While no runner lives, the ledger does not know how many jobs it left. The limit holds all the same."""
    for _ in range(LEAST + 3):
        stage.add()
    assert backlog_limit.waiting_in_ledger(stage.ledger) is None
    with pytest.raises(BacklogFull):
        BacklogLimit(lambda: backlog_limit.waiting_in_ledger(stage.ledger), lambda: stage.engine).check(LEAST + 3)
    stage.refill()
    assert backlog_limit.waiting_in_ledger(stage.ledger) == LEAST + 3


def test_submit_tells_that_a_job_stays_in_postgres(stage: Head) -> None:
    for _ in range(LEAST):
        stage.add()
    job = stage.insert({"cpus": 1000})
    with stage.engine.connect() as connection:
        row = backlog.these(connection, [job])[0]
    assert stage.ledger.submit_one(row.submission()).state is SubmitVerdict.LEFT
    assert stage.ledger.bring([row.submission()]).left == (0,)


def test_raised_job_that_stays_in_postgres_starts_before_those_in_redis(stage: Head) -> None:
    stage.worker("w", cpus=1000)
    jobs = [stage.add() for _ in range(8)]
    stage.refill()
    assert stage.row(jobs[-1]).behind == SHAPE
    app = create_app("head", resolve=lambda _: stage.settings)
    (raised,) = priorities.set_priority(app.platform, [jobs[-1]], 9)
    assert (raised.became, raised.priority) == ("moved", 9)
    # Nothing starts before it was fetched, so order holds.
    stage.start(jobs[0])
    stage.end(jobs[0])
    assert stage.held() == []
    stage.refill()
    assert stage.drain() == [jobs[-1], *jobs[1:-1]]
    app.platform.engine.dispose()


def test_lowered_job_in_redis_lets_those_in_postgres_pass(stage: Head) -> None:
    stage.worker("w", cpus=1000)
    jobs = [stage.add(priority=5) for _ in range(6)]
    stage.refill()
    app = create_app("head", resolve=lambda _: stage.settings)
    assert jobs[1] in stage.filed()
    priorities.set_priority(app.platform, [jobs[1]], 0)
    assert stage.drain() == [jobs[0], *jobs[2:], jobs[1]]
    app.platform.engine.dispose()


def test_reconcile_gives_a_job_the_place_of_its_row(stage: Head) -> None:
    stage.worker("w", cpus=1000)
    jobs = [stage.add() for _ in range(3)]
    # The program that set the priority died before the ledger heard of it.
    stage.sql("UPDATE jobs SET priority = 9, reprioritized = true WHERE id = :id", id=jobs[2])
    done = reconcile.reconcile(stage.engine, stage.ledger)
    assert (done.drift, done.all_repaired) == (1, True)
    stage.apply()
    assert stage.filed() == [jobs[2], jobs[1]]
    assert stage.drain() == [jobs[0], jobs[2], jobs[1]]


def _shown(stage: Head) -> int:
    return overview.read(quick_client(stage.redis), stage.engine).waiting


def test_overview_counts_jobs_whose_rows_nobody_has_marked(stage: Head) -> None:
    """While no worker lives, nobody marks rows. Postgres counts the jobs that the ledger left there."""
    for _ in range(LEAST + 3):
        stage.add()
    stage.add(cpus=2000)
    assert _shown(stage) == LEAST + 4
    stage.refill()
    assert _shown(stage) == LEAST + 4
    stage.add()
    assert _shown(stage) == LEAST + 5


def test_overview_counts_left_jobs_of_each_priority_once(stage: Head) -> None:
    """A job of a higher priority moves the border before jobs that are in Redis, where they are counted already."""
    for _ in range(LEAST + 1):
        stage.bring(stage.insert({"cpus": 1000}))
    for _ in range(2):
        stage.bring(stage.insert({"cpus": 1000}, 5))
    assert _shown(stage) == LEAST + 3


def test_left_job_knows_its_position_before_its_row_is_marked(stage: Head) -> None:
    jobs = [stage.add() for _ in range(LEAST + 3)]
    high = stage.add(priority=5)
    with stage.engine.connect() as connection:
        places = {job: explain(stage.redis, connection, job) for job in (*jobs, high)}
    before = {job: place.before for job, place in places.items() if place is not None}
    assert before == {high: 0} | {job: 1 + number for number, job in enumerate(jobs)}


def test_overview_shows_the_ledger_alone_while_postgres_does_not_count(
    stage: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(LEAST + 3):
        stage.add()

    def away(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("away"))

    monkeypatch.setattr(waiting, "count_left", away)
    assert _shown(stage) == LEAST
