"""Constraints of jobs, in Postgres: one job of equal ones, jobs that wait for others, and rates.

The rules hold alike in either store, whichever of them decides who starts.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from unittest.mock import Mock

import pytest
from celery import Celery
from celery.result import AsyncResult, GroupResult
from hypothesis import HealthCheck, given, settings, strategies
from sqlalchemy import Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.schema import CHANNEL
from celery_capacity.routing.errors import InvalidRequest, NotAccepted
from celery_capacity.routing.insert import single, successors
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.job import Constraints, NewJob, Publisher, Rate
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome, State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import backlog, claims, dependencies, fencing, job_transitions
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.membership.authority_check import Confirmation
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.holdings import Holding, Holdings
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.results.deliver_later import deliver_rows
from celery_capacity.workers.retention import unique_keys
from celery_capacity.workers.settle.postgres_ends import End, PostgresEnds
from celery_capacity.workers.submit.constraints import declare_rates, key_of, rate_of
from tests.fixtures.stores.authorities import Authority
from tests.fixtures.stores.staged import MESSAGE, Stage
from tests.fixtures.waiting import until

TASK: Final = "some.task"
SHAPE: Final = "cpus=1000,slots=1"
#: Counts the statements that wait for somebody else's row.
WAITING: Final = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


#: Has the worker take a job, if it may, and end it: `run(job, outcome)`.
Run = Callable[..., None]


@pytest.fixture
def stage(authority: Authority) -> Stage:
    """Return both stores, with a worker `a` of eight CPUs, where one of the stores decides."""
    authority.worker("a", cpus=8000)
    return authority.stage


@pytest.fixture
def app(authority: Authority) -> Celery:
    return authority.app


@pytest.fixture
def duty(authority: Authority) -> Callable[[], dict[str, int]]:
    return authority.duty


@pytest.fixture
def run(authority: Authority) -> Run:
    def run(job: str, outcome: str = "succeeded") -> None:
        assert authority.claims("a", job)
        assert authority.end(job, outcome) == "released"

    return run


def send(app: Celery, **options: Any) -> str:
    return str(app.send_task(TASK, options.pop("args", []), **options).id)


def end_unfiled(stage: Stage, job: str) -> bool:
    with stage.engine.connect() as connection:
        return backlog.end_unfiled(connection, job, State.CANCELLED)


def state(stage: Stage, job: str) -> str:
    """Return the job's state in Postgres, after all that the ledger noted."""
    stage.apply()
    return str(stage.row(job).state)


def takes(stage: Stage) -> list[str]:
    """Return the jobs that a worker would take from Postgres now."""
    with stage.engine.connect() as connection:
        return [candidate.job for candidate in claims.candidates(connection, 100)]


# -- unique


def test_of_many_who_submit_the_same_at_once_one_makes_the_job(app: Celery, stage: Stage) -> None:
    start = threading.Barrier(32)

    def submit(number: int) -> str:
        start.wait()
        while True:
            try:
                return send(app, args=[1, {"b": 2, "a": number % 1}], unique=True)
            except NotAccepted as refused:
                # On a busy machine the others hold the key for longer than a submission waits. The advice is to repeat.
                assert "lock timeout" in str(refused)

    with ThreadPoolExecutor(32) as threads:
        ids = set(threads.map(submit, range(32)))
    assert len(ids) == 1
    assert stage.row(ids.pop()).state in ("accepted", "waiting", "admitted")
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 1


def test_one_that_is_not_committed_yet_is_waited_for(app: Celery, stage: Stage, engine: Engine) -> None:
    """The second submission began before the first one's row could be seen."""
    for commits in (True, False):
        key = key_of(TASK, [], {}, f"commits {commits}")
        with ThreadPoolExecutor(1) as thread, engine.connect() as connection:
            single.insert_job(
                connection, NewJob(f"first-{commits}", TASK, SHAPE, MESSAGE, constraints=Constraints(key=key))
            )
            second = thread.submit(send, app, unique=f"commits {commits}")
            with stage.engine.connect() as other:
                while not other.execute(text(WAITING)).scalar_one():
                    pass
            (connection.commit if commits else connection.rollback)()
            assert (second.result() == f"first-{commits}") is commits
    stage.ledger.client.flushdb()


def test_the_next_one_is_another_job_once_the_first_has_ended(app: Celery, stage: Stage, run: Run) -> None:
    first = send(app, args=[1], unique=True)
    assert send(app, args=[1], unique=True) == first
    others = {send(app, args=[2], unique=True), send(app, args=[1]), send(app, args=[1], unique="a text")}
    assert first not in others and len(others) == 3
    run(first, "failed")
    second = send(app, args=[1], unique=True)
    assert second != first
    assert send(app, args=[1], unique=True) == second


def test_an_equal_one_is_the_same_job_for_a_time_though_it_has_ended(app: Celery, stage: Stage, run: Run) -> None:
    first = send(app, unique_for=60)
    run(first)
    assert send(app, unique_for=60) == first
    stage.sql("UPDATE unique_keys SET until = until - interval '1 minute'")
    assert send(app, unique_for=60) != first


def test_the_key_is_the_callers_whatever_the_task_and_the_id(app: Celery, stage: Stage) -> None:
    first = send(app, unique="nightly")
    again = app.send_task("another.task", [7], task_id="mine", unique="nightly")
    assert isinstance(again, AsyncResult) and again.id == first
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 1
    # A repeat of the first submission, as after an answer that was lost.
    assert send(app, unique="nightly", task_id=first) == first


def test_a_retry_of_the_job_is_not_kept_out_by_its_own_key(app: Celery, stage: Stage) -> None:
    first = send(app, unique=True)
    stage.apply()
    retry = NewJob(first, TASK, SHAPE, MESSAGE, retries=1, constraints=Constraints(key=key_of(TASK, [], {}, True)))
    with stage.engine.connect() as connection:
        assert single.insert_job(connection, retry).same_as is None
        assert successors.put_successor(connection, retry) is not None


def test_a_submission_that_fails_leaves_its_key_free(app: Celery, stage: Stage) -> None:
    with pytest.raises(InvalidRequest, match="not the id of a job"):
        send(app, unique="key", after=["nobody"])
    with stage.engine.connect() as connection:
        for table in ("jobs", "unique_keys", "dependencies"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 0
    assert state(stage, send(app, unique="key")) != "cancelled"


#: Options that contradict themselves, or mean nothing.
WRONG: Final[tuple[dict[str, Any], ...]] = (
    {"unique": ""},
    {"unique": 7},
    {"unique": True, "args": [object()]},
    {"unique_for": 0},
    {"unique_for": float("nan")},
    {"unique_for": "60"},
    {"unique": True, "link": ["x"]},
    {"unique": True, "chain": []},
    {"unique": True, "group_id": "g"},
    {"after": 7},
    {"after": ["a b"]},
    {"after": "mine", "task_id": "mine"},
    {"after": "other", "retries": 1},
    {"after": "other", "replaced_task_nesting": 1},
)


def test_invalid_constraints_are_refused(app: Celery, stage: Stage) -> None:
    for options in WRONG:
        with pytest.raises(InvalidRequest):
            send(app, **options)
    assert takes(stage) == []


def test_keys_that_keep_nobody_out_are_forgotten_after_a_while(app: Celery, stage: Stage, run: Run) -> None:
    ended, lives, lasts = send(app, unique="a"), send(app, unique="b"), send(app, unique="c", unique_for=3600)
    for job in (ended, lasts):
        run(job)
    assert unique_keys.run_once(app, app.platform)["forgotten"] == 0
    stage.sql("UPDATE unique_keys SET claimed_at = claimed_at - interval '1 hour'")
    assert unique_keys.run_once(app, app.platform)["forgotten"] == 1
    assert (send(app, unique="b"), send(app, unique="c")) == (lives, lasts)
    assert send(app, unique="a") != ended


# -- after


def test_a_job_waits_until_all_that_it_needs_have_succeeded(app: Celery, stage: Stage, run: Run, duty: Any) -> None:
    first, second = send(app), send(app)
    last = send(app, after=[AsyncResult(first, app=app), second, second])
    assert (state(stage, last), stage.row(last).needs) == ("scheduled", 2)
    assert last not in takes(stage)
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, last)
        assert explanation is not None and (explanation.why, set(explanation.needs)) == (
            Reason.NEEDS_JOBS,
            {first, second},
        )
    run(first)
    duty()
    assert state(stage, last) == "scheduled"
    run(second)
    duty()
    run(last)
    assert state(stage, last) == "succeeded"
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM dependencies")).scalar_one() == 0


def test_job_does_not_wait_for_jobs_that_have_succeeded(app: Celery, stage: Stage, run: Run) -> None:
    first, archived = send(app), send(app)
    for job in (first, archived):
        run(job)
    stage.sql("UPDATE jobs SET finished_at = finished_at - interval '1 day' WHERE id = :id", id=archived)
    stage.sql("SELECT archive_finished(60, 10)")
    results = GroupResult("g", [AsyncResult(first, app=app), AsyncResult(archived, app=app)])
    job = send(app, after=results)
    assert state(stage, job) in ("accepted", "admitted")
    run(job)


@pytest.mark.parametrize("outcome", ["failed", "cancelled", "lost", "expired"])
def test_failed_job_ends_all_jobs_that_need_it_directly_or_not(
    app: Celery, stage: Stage, duty: Any, outcome: str
) -> None:
    first, other = send(app), send(app)
    second = send(app, after=[first, other])
    third = send(app, after=second)
    with stage.engine.connect() as connection:
        stage.apply()
        row = stage.row(first)
        ended = Transition(first, Token(row.epoch, row.attempt), outcome, Step.DROPPED, "", "", 0, 0, 1, 0)
        (applied,) = job_transitions.apply(connection, [ended])
    assert applied.awaited
    duty()
    assert [(stage.row(job).state, stage.row(job).error) for job in (second, third)] == [
        ("cancelled", f"job {first}, which it needs, ended as {outcome}"),
        ("cancelled", f"job {second}, which it needs, ended as cancelled"),
    ]
    assert [app.AsyncResult(job).state for job in (second, third)] == ["REVOKED", "REVOKED"]
    fourth = send(app, after=third)
    duty()
    assert "ended as cancelled" in stage.row(fourth).error
    stage.sql("UPDATE jobs SET state = 'succeeded', finished_at = now(), outbox = NULL WHERE finished_at IS NULL")
    stage.sql("UPDATE attempts SET outcome = 'succeeded', ended_at = now() WHERE ended_at IS NULL")
    duty()
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM dependencies")).scalar_one() == 0
    stage.ledger.client.flushdb()


def test_a_job_that_waits_for_others_keeps_its_time_and_its_expiry(
    app: Celery, stage: Stage, run: Run, duty: Any
) -> None:
    first = send(app)
    later = send(app, after=first, countdown=3600)
    late = send(app, after=first, expires=3600)
    stage.sql("UPDATE jobs SET expires_at = now() WHERE id = :id", id=late)
    duty()
    assert (stage.row(late).state, stage.row(later).due_at) == ("expired", None)
    run(first)
    duty()
    row = stage.row(later)
    assert row.state == "scheduled" and row.due_at > datetime.now(UTC) + timedelta(minutes=50)


def test_a_job_that_waits_for_others_can_be_revoked(app: Celery, stage: Stage, run: Run, duty: Any) -> None:
    first = send(app)
    second = send(app, after=first)
    third = send(app, after=second)
    app.control.revoke(second)
    assert [stage.row(job).state for job in (second, third)] == ["cancelled", "cancelled"]
    assert app.AsyncResult(third).state == "REVOKED"
    run(first)
    duty()
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM dependencies")).scalar_one() == 0


def test_an_end_that_is_committed_by_its_own_attempt_opens_gates_too(app: Celery, stage: Stage, duty: Any) -> None:
    first = send(app)
    second = send(app, after=first)
    stage.apply()
    if stage.row(first).attempt == 0:
        with stage.engine.connect() as connection:
            claims.take(connection, 1, "a", "a-life", [first])
    row = stage.row(first)
    with stage.engine.connect() as connection:
        assert fencing.commit(connection, Publisher(first, Token(row.epoch, row.attempt), "a-life"))
    duty()
    assert stage.row(second).due_at is not None


def test_a_worker_that_pulls_opens_gates_by_its_own_word(
    app: Celery, authority: Authority, stage: Stage, settings: Settings
) -> None:
    """Where Postgres decides, the workers that wait for something to take are told at once."""
    if authority.name == "ledger":
        stage.sql("UPDATE authority SET authority = 'postgres'")
    first = send(app)
    second = send(app, after=first)
    third = send(app, after=second)
    calls: list[str] = []
    holdings = Holdings({"cpus": 8000, "slots": 8})
    with stage.engine.connect() as connection:
        (taken,) = claims.take(connection, 1, "a", "a-life", [first])
        holdings.add(Holding(first, taken.token, Request.from_shape(taken.shape), ""))
        connection.execute(text(f"LISTEN {CHANNEL}"))
        confirmation = Confirmation(stage.engine, 1.0, lambda: None)
        confirmation.ask()
        recorder: Any = Mock(call=lambda action: action())
        parts = (Identity("a"), confirmation, holdings, recorder)
        ends = PostgresEnds(
            WorkerContext(settings, stage.engine, stage.ledger, *parts),
            lambda: calls.append("room"),
            lambda: calls.append("outbox"),
            lambda _: calls.append("parts"),
            lambda *_: calls.append("late"),
        )
        assert ends.settle(deque([End(Ended(first, taken.token, Outcome.SUCCEEDED))]), deque())
        heard: Any = connection.connection.driver_connection
        until(lambda: heard.poll() or heard.notifies, "the workers are told")
        assert takes(stage) == [second]
        (taken,) = claims.take(connection, 1, "a", "a-life", [second])
        holdings.add(Holding(second, taken.token, Request.from_shape(taken.shape), ""))
        assert ends.settle(deque([End(Ended(second, taken.token, Outcome.FAILED))]), deque())
    assert stage.row(third).state == "cancelled"
    assert sorted(calls) == ["outbox", "room", "room"]
    deliver_rows(app, app.platform)
    assert app.AsyncResult(third).state == "REVOKED"


def test_an_end_at_the_same_moment_is_seen(app: Celery, stage: Stage, engine: Engine) -> None:
    """The job ends in a transaction that began before the other job says that it needs it, and commits after."""
    first = send(app)
    ends = engine.connect()
    ends.execute(
        text("UPDATE jobs SET state = 'succeeded', finished_at = now(), step = 12 WHERE id = :id"), {"id": first}
    )
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(send, app, after=first)
        with engine.connect() as connection:
            while not connection.execute(text(WAITING)).scalar_one():
                connection.rollback()
        ends.commit()
        second = sent.result()
    ends.close()
    assert stage.row(second).needs == 0
    stage.ledger.client.flushdb()


def test_an_end_waits_for_one_who_says_that_it_needs_it(app: Celery, stage: Stage, engine: Engine) -> None:
    """The end begins second here, and waits until the transaction of the job that needs it commits."""
    first = stage.insert({"cpus": 1000})
    with ThreadPoolExecutor(1) as thread, engine.connect() as connection:
        single.insert_job(connection, NewJob("second", TASK, SHAPE, MESSAGE, constraints=Constraints(after=(first,))))
        ended = thread.submit(end_unfiled, stage, first)
        with stage.engine.connect() as other:
            while not other.execute(text(WAITING)).scalar_one():
                pass
        connection.commit()
        assert ended.result()
    assert dependencies.open_needs(stage.engine).cancelled == ["second"]
    stage.ledger.client.flushdb()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    needs=strategies.lists(strategies.sets(strategies.integers(0, 7), max_size=3), min_size=2, max_size=8),
    outcomes=strategies.lists(strategies.sampled_from(["succeeded", "failed"]), min_size=8, max_size=8),
    order=strategies.permutations(range(8)),
)
def test_any_jobs_that_need_one_another_end_as_the_rule_says(
    engine: Engine, needs: list[set[int]], outcomes: list[str], order: list[int]
) -> None:
    """A job runs if all that it needs succeeded; else it is cancelled."""
    engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("TRUNCATE jobs, dependencies"))
        for number, before in enumerate(needs):
            after = tuple(f"j{other}" for other in sorted(before) if other < number)
            shut = Constraints(after=after) if after else None
            single.insert_job(connection, NewJob(f"j{number}", TASK, SHAPE, MESSAGE, constraints=shut))
        may_run = "state = 'accepted' OR (state = 'scheduled' AND due_at <= clock_timestamp())"
        while True:
            open_now = connection.execute(text(f"SELECT id FROM jobs WHERE {may_run}")).scalars().all()
            if not open_now:
                break
            job = min(open_now, key=lambda other: order.index(int(other[1:])))
            ends = "UPDATE jobs SET state = :state, finished_at = now() WHERE id = :id"
            connection.execute(text(ends), {"state": outcomes[int(job[1:])], "id": job})
            dependencies.open_needs(engine)
        states = {row.id: row.state for row in connection.execute(text("SELECT id, state FROM jobs"))}
        left = connection.execute(text("SELECT count(*) FROM dependencies")).scalar_one()
    expected: dict[str, str] = {}
    for number, before in enumerate(needs):
        ok = all(expected[f"j{other}"] == "succeeded" for other in before if other < number)
        expected[f"j{number}"] = outcomes[number] if ok else "cancelled"
    assert (states, left) == (expected, 0)


def test_publish_left_by_an_attempt_keeps_its_constraints(stage: Stage) -> None:
    left = [
        NewJob("a", TASK, SHAPE, MESSAGE, constraints=Constraints(key="k" * 64)),
        NewJob("b", TASK, SHAPE, MESSAGE, constraints=Constraints(key="k" * 64)),
        NewJob("c", TASK, SHAPE, MESSAGE, constraints=Constraints(after=("a",))),
        NewJob("d", TASK, SHAPE, MESSAGE, constraints=Constraints(after=("nobody",))),
        NewJob("e", TASK, SHAPE, MESSAGE, constraints=Constraints(rate=Rate(0.5, "30/m"))),
        NewJob("f", TASK, SHAPE, MESSAGE, constraints=Constraints(rate=Rate(0.5, "30/m"))),
    ]
    with stage.engine.connect() as connection:
        assert successors.publish_left(connection, Outbox(left).to_text()) == ["a", "e"]
        rows = connection.execute(text("SELECT id || ' ' || state FROM jobs ORDER BY id")).scalars().all()
    assert rows == ["a accepted", "c scheduled", "d scheduled", "e scheduled", "f scheduled"]
    dependencies.open_needs(stage.engine)
    assert stage.row("d").error == "job nobody, which it needs, is unknown"


# -- rates


def limit(app: Celery, stage: Stage, said: Any) -> None:
    """Set a rate at run time, for which no time passes unless the test says so."""
    app.control.rate_limit(TASK, said)
    stage.sql("UPDATE rates SET counted_at = clock_timestamp() + interval '1 day'")


def pass_time(stage: Stage, seconds: float) -> None:
    stage.sql("UPDATE rates SET tokens = tokens + rate * :seconds", seconds=seconds)


def started(stage: Stage, jobs: list[str]) -> list[str]:
    """Return the jobs of this list that were let go."""
    return [job for job in jobs if stage.row(job).due_at is not None]


def test_a_rate_lets_jobs_go_in_their_order_as_many_as_its_time_allows(app: Celery, stage: Stage, duty: Any) -> None:
    limit(app, stage, "20/s")
    low = [send(app) for _ in range(12)]
    high = send(app, priority=5)
    assert started(stage, low) == low[:1]
    pass_time(stage, 0.25)
    duty()
    assert (started(stage, low), started(stage, [high])) == (low[:5], [high])
    duty()
    assert started(stage, low) == low[:5]
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, low[-1])
        assert explanation is not None and (explanation.why, explanation.rate) == (Reason.RATE_LIMIT, "20/s")


def test_a_cluster_that_was_full_does_not_start_all_at_once_afterwards(
    app: Celery, stage: Stage, run: Run, duty: Any
) -> None:
    limit(app, stage, "10/s")
    jobs = [send(app) for _ in range(20)]
    for _ in range(3):
        pass_time(stage, 60)
        duty()
    # None of them was claimed: no more than a second's worth is ahead.
    assert started(stage, jobs) == jobs[:10]
    for job in jobs[:4]:
        run(job)
    pass_time(stage, 60)
    duty()
    assert started(stage, jobs) == jobs[:14]


def test_a_slow_rate_lets_the_first_go_at_once_and_no_second(app: Celery, stage: Stage, run: Run, duty: Any) -> None:
    limit(app, stage, "1/h")
    jobs = [send(app) for _ in range(3)]
    run(jobs[0])
    pass_time(stage, 3000)
    duty()
    assert started(stage, jobs) == jobs[:1]
    pass_time(stage, 600)
    duty()
    assert started(stage, jobs) == jobs[:2]


def test_a_rate_that_is_lifted_lets_all_go(app: Celery, stage: Stage, duty: Any) -> None:
    limit(app, stage, "1/h")
    jobs = [send(app) for _ in range(3)]
    app.control.broadcast("rate_limit", arguments={"task_name": TASK, "rate_limit": "0"})
    duty()
    assert started(stage, jobs) == jobs
    assert state(stage, send(app)) in ("accepted", "admitted")


def test_job_under_a_rate_keeps_its_eta_and_its_dependencies(app: Celery, stage: Stage, run: Run, duty: Any) -> None:
    limit(app, stage, "100/s")
    first = send(app)
    later, after = send(app, countdown=3600), send(app, after=first)
    for _ in range(2):
        pass_time(stage, 60)
        duty()
    assert started(stage, [first, later, after]) == [first]
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, later)
        assert explanation is not None and explanation.why is Reason.SCHEDULED and explanation.due_at is not None
    run(first)
    duty()
    assert started(stage, [later, after]) == [after]


def test_a_retry_starts_by_the_rate_too(app: Celery, stage: Stage, duty: Any) -> None:
    limit(app, stage, "1/h")
    job = send(app)
    stage.apply()
    if stage.row(job).attempt == 0:
        with stage.engine.connect() as connection:
            claims.take(connection, 1, "a", "a-life", [job])
    else:
        stage.start(job)
    row = stage.row(job)
    with stage.engine.connect() as connection:
        assert successors.put_successor(connection, NewJob(job, TASK, SHAPE, MESSAGE, retries=1))
        back = Transition(
            job, Token(row.epoch, row.attempt), State.SCHEDULED, Step.BACK, "a", "a-life", 1, 1, 2, 0, "retried"
        )
        (applied,) = job_transitions.apply(connection, [back])
    assert not applied.due
    stage.ledger.remove_job(job, Token(row.epoch, row.attempt), final=False)
    duty()
    assert started(stage, [job]) == []
    pass_time(stage, 3600)
    duty()
    assert started(stage, [job]) == [job]


def test_job_that_puts_itself_back_starts_by_the_rate_too(app: Celery, stage: Stage, run: Run, duty: Any) -> None:
    limit(app, stage, "1/h")
    job = send(app)
    for pause in (0, 1):
        run(job, "requeued")
        duty()
        assert (state(stage, job), started(stage, [job])) == ("scheduled", [])
        row = stage.row(job)
        with stage.engine.connect() as connection:
            query = "SELECT max(ended_at) FROM attempts WHERE job_id = %(job)s"
            ended = connection.exec_driver_sql(query, {"job": job}).scalar_one()
        assert (row.not_before - ended).total_seconds() == pytest.approx(pause, abs=0.5)
        pass_time(stage, 3600)
        stage.sql("UPDATE jobs SET not_before = now() WHERE id = :id", id=job)
        duty()
        assert started(stage, [job]) == [job]


def test_declared_rate_holds_unless_another_is_set_at_run_time(app: Celery, stage: Stage) -> None:
    @app.task(name=TASK, rate_limit="1/h", shared=False)
    def limited() -> None: ...

    jobs = [limited.delay().id for _ in range(2)]
    assert started(stage, jobs) == jobs[:1]
    app.control.rate_limit(TASK, 0)
    assert stage.row(limited.delay().id).rated is False
    app.control.rate_limit(TASK, "2/h")
    assert stage.row(limited.delay().id).rated is True


def test_worker_publishes_the_declarations_of_its_tasks_for_senders(app: Celery, stage: Stage) -> None:
    @app.task(name=TASK, rate_limit="1/h", shared=False)
    def limited() -> None: ...

    declare_rates(app, app.platform)
    del app.tasks[TASK]
    jobs = [send(app) for _ in range(2)]
    assert (started(stage, jobs), stage.row(jobs[1]).rated) == (jobs[:1], True)

    @app.task(name=TASK, shared=False)
    def limited_no_more() -> None: ...

    declare_rates(app, app.platform)
    app.amqp.job_sender.rates.forget()
    assert stage.row(limited_no_more.delay().id).rated is False


def test_a_rate_that_is_none_is_refused(app: Celery) -> None:
    for limit in ("often", "1/y", -1, True, [1], "nan"):
        with pytest.raises(InvalidRequest):
            app.control.rate_limit(TASK, limit)
    with pytest.raises(InvalidRequest, match="whole cluster"):
        app.control.rate_limit(TASK, "1/m", destination=["a@host"])


def test_a_rate_is_as_celery_reads_it() -> None:
    read = [rate_of(written, "rate") for written in (None, "", 0, "0/s", 5, "5", "6/m", "36/h", "0.5/s")]
    assert [rate and rate.per_second for rate in read] == [None, None, None, None, 5.0, 5.0, 0.1, 0.01, 0.5]
