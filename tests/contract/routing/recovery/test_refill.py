"""The ledger holds the head of the backlog. Other jobs stay in Postgres, and start in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import keys, scripts
from celery_capacity.routing.ledger.replies import CancelVerdict, LedgerClosed, SubmitVerdict
from celery_capacity.routing.model.request import Request, filed_shape
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import rebuild, reconcile, refill, resubmit
from celery_capacity.routing.store import backlog, job_transitions
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.client import priorities
from tests.fixtures.stores.staged import Stage

#: Waiting jobs that each shape may have in the ledger of these tests.
LEAST: Final = 2
SHAPE: Final = filed_shape(Request.of({"cpus": 1000}).shape, "task")


class Head(Stage):
    """A stage whose jobs are submitted as their rows say, and fetched when the test says so."""

    def add(self, priority: int = 0, cpus: int = 1000) -> str:
        """Submit a job, and apply its transition."""
        job = self.insert({"cpus": cpus}, priority)
        self.bring(job)
        self.apply()
        return job

    def bring(self, job: str) -> int:
        with self.engine.connect() as connection:
            rows = backlog.these(connection, [job])
        return resubmit.submit_rows(self.ledger, rows)

    def refill(self) -> dict[str, int]:
        counts = refill.refill(self.engine, self.ledger)
        self.apply()
        return counts

    def filed(self, shape: str = SHAPE) -> list[str]:
        jobs: list[Any] = self.redis.zrange(keys.wait(shape), 0, -1)
        return [job.decode() for job in jobs]

    def staying(self) -> dict[str, int]:
        with self.engine.connect() as connection:
            return {shape: number for shape, number, _ in backlog.staying(connection)}

    def held(self) -> list[str]:
        jobs: list[Any] = self.redis.hkeys(keys.held("w"))
        return sorted(job.decode() for job in jobs)

    def drain(self, *, fetch: bool = True) -> list[str]:
        """End the jobs of the worker, one by one, until none is left; return them in the order of their starts."""
        started: list[str] = []
        while held := self.held():
            started += [job for job in held if job not in started]
            self.start(held[0])
            self.end(held[0])
            if fetch:
                self.refill()
        return started


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scripts, "LEAST_WAITING", LEAST)
    scripts.load.cache_clear()
    yield
    scripts.load.cache_clear()


@pytest.fixture
def stage(least: None, engine: Engine, settings: Settings) -> Iterator[Head]:
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


def test_heads_share_the_limit_while_all_wait_for_others(least: None, engine: Engine, settings: Settings) -> None:
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
        assert job_transitions.end_unfiled(connection, jobs[LEAST], end)
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
        patch.setattr(stage.ledger, "refill", dies)
        with pytest.raises(LedgerClosed):
            stage.refill()
    assert stage.row(jobs[LEAST]).state == State.ACCEPTED
    stage.refill()
    assert stage.drain() == jobs


def test_jobs_are_fetched_before_all_rows_are_marked(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refill, "MARK_CHUNK", 2)
    monkeypatch.setattr(refill, "MARK_MOST", 2)
    monkeypatch.setattr(refill, "MAX_PASSES", 1)
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


def test_submit_tells_that_a_job_stays_in_postgres(stage: Head) -> None:
    for _ in range(LEAST):
        stage.add()
    job = stage.insert({"cpus": 1000})
    with stage.engine.connect() as connection:
        row = backlog.these(connection, [job])[0]
    assert stage.ledger.submit_one(row.submission()).state is SubmitVerdict.LEFT
    assert stage.ledger.bring([row.submission()]).left == (0,)


#: A step: a job of a priority and of a size comes, or a job ends.
STEPS: Final = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([0, 0, 0, 5, 9]), st.sampled_from([1000, 1000, 2000])),
        st.just("end"),
    ),
    min_size=4,
    max_size=30,
)


def starts(engine: Engine, settings: Settings, most: int, steps: list[Any]) -> list[str]:
    """Take steps with a limit of the ledger's backlog, and return the jobs in the order of their starts."""
    stage = Head(engine, replace(settings, max_ledger_backlog=most))
    stage.sql("TRUNCATE jobs, attempts")
    stage.redis.flushdb()
    stage.ledger.open_epoch(stage.ledger.epoch)
    stage.ledger.finish_epoch(stage.ledger.epoch)
    stage.worker("w", cpus=2000)
    started: list[str] = []
    for step in [*steps, *["end"] * len(steps)]:
        if step != "end":
            stage.add(*step)
        elif held := sorted(stage.held(), key=started.index):
            stage.start(held[0])
            stage.end(held[0])
        stage.refill()
        started += [job for job in stage.held() if job not in started]
    assert verify.check(engine, stage.redis, at_rest=True, patience=0).lines() == []
    stage.close()
    return started


@pytest.mark.long(45)
@hypothesis_settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(STEPS)
def test_jobs_start_in_the_order_of_an_unlimited_ledger(
    least: None, engine: Engine, settings: Settings, steps: list[Any]
) -> None:
    limited = starts(engine, settings, 1, steps)
    assert limited == starts(engine, settings, 0, steps)
    assert len(limited) == sum(step != "end" for step in steps)


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
