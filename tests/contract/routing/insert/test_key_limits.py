"""Limits by key, in Postgres: at most so many jobs of a key at once, and a rate of its starts.

The rules hold alike in either store, whichever of them decides who starts.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
from celery import Celery
from hypothesis import HealthCheck, given, settings, strategies
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.insert import key_limits, successors
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import resubmit
from celery_capacity.routing.store.job_transitions import Applied
from celery_capacity.workers.client.retry import retry
from tests.fixtures.stores.authorities import Authority

TASK: Final = "task"
SHAPE: Final = "cpus=1000,slots=1"


@pytest.fixture
def cluster(authority: Authority) -> Authority:
    """Return a cluster with a worker `a` of a hundred CPUs."""
    authority.worker("a", cpus=100_000)
    return authority


def send(cluster: Authority, limit: Any = None, **options: Any) -> str:
    """Submit a job with a limit, one job of the key "key" at once where none is given; return its id."""
    app: Celery = cluster.app
    limits = {"limit": {"key": 1} if limit is None else limit} if "rate" not in options or limit else {}
    return str(app.send_task(TASK, options.pop("args", []), **limits, **options).id)


def started(cluster: Authority) -> list[str]:
    """Let the worker start what it may, and return the jobs that run."""
    cluster.stores.sending.flush()
    cluster.starts("a")
    with cluster.stage.engine.connect() as connection:
        query = text("SELECT id FROM jobs WHERE state IN ('admitted', 'running') ORDER BY seq")
        return list(connection.execute(query).scalars())


def holders(cluster: Authority, key: str = "key") -> int:
    with cluster.stage.engine.connect() as connection:
        query = text("SELECT count(*) FROM job_keys WHERE key = :key AND phase = 'holds'")
        return int(connection.execute(query, {"key": key}).scalar_one())


def end(cluster: Authority, job: str, outcome: str = "succeeded") -> str:
    """Let the worker end a job, and do at once what follows the write of an end."""
    verdict = cluster.end(job, outcome)
    if cluster.name == "ledger":
        ended = [Applied(job, outcome, due=False, awaited=True, limited=True)]
        resubmit.go_on(cluster.stage.engine, cluster.stage.ledger, ended)
        cluster.stage.apply()
    return verdict


def rows(cluster: Authority) -> int:
    with cluster.stage.engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM job_keys")).scalar_one())


def test_end_starts_the_next_job_of_the_key_at_once(cluster: Authority) -> None:
    jobs = [send(cluster, {"key": 2}) for _ in range(5)]
    other = send(cluster, {"other": 1})
    assert started(cluster) == [*jobs[:2], other]
    assert end(cluster, jobs[0]) == "released"
    assert started(cluster) == [*jobs[1:3], other]
    for job in jobs[1:]:
        started(cluster)
        assert end(cluster, job) == "released"
    assert (holders(cluster), started(cluster)) == (0, [other])


def test_held_job_is_scheduled_and_in_no_ledger(cluster: Authority) -> None:
    _, held = send(cluster), send(cluster)
    row = cluster.row(held)
    assert (row.state, row.due_at) == ("scheduled", None)
    assert not cluster.stage.redis.exists(f"job:{held}")


def test_key_goes_to_the_highest_priority_then_the_oldest(cluster: Authority) -> None:
    first = send(cluster)
    low, high = send(cluster), send(cluster, priority=5)
    for job in (first, high, low):
        assert started(cluster) == [job]
        end(cluster, job)


def test_number_of_each_job_counts_for_itself(cluster: Authority) -> None:
    strict, wide = {"key": 1}, {"key": 3}
    first, waits, second = send(cluster, strict), send(cluster, strict), send(cluster, wide)
    assert started(cluster) == [first, second]
    end(cluster, first)
    assert started(cluster) == [second]
    end(cluster, second)
    assert started(cluster) == [waits]


def test_job_with_two_keys_needs_room_in_both(cluster: Authority) -> None:
    left, right = send(cluster, {"a": 1}), send(cluster, {"b": 1})
    both, behind = send(cluster, {"a": 1, "b": 1}), send(cluster, {"b": 1})
    assert started(cluster) == [left, right]
    end(cluster, right)
    assert started(cluster) == [left, behind]
    end(cluster, left)
    end(cluster, behind)
    assert started(cluster) == [both]


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled"])
def test_every_end_lets_go_of_the_key(cluster: Authority, outcome: str) -> None:
    first, second = send(cluster), send(cluster)
    assert started(cluster) == [first]
    end(cluster, first, outcome)
    assert started(cluster) == [second]


def test_revoked_and_expired_jobs_leave_the_line(cluster: Authority) -> None:
    first, revoked, expired, last = send(cluster), send(cluster), send(cluster, expires=3600), send(cluster)
    assert started(cluster) == [first]
    cluster.revoke(revoked)
    cluster.stage.sql("UPDATE jobs SET expires_at = now() - interval '1 s' WHERE id = :id", id=expired)
    cluster.duty()
    assert [cluster.row(job).state for job in (revoked, expired)] == ["cancelled", "expired"]
    end(cluster, first)
    assert started(cluster) == [last]
    end(cluster, last)
    assert rows(cluster) == 0


def test_lost_attempt_keeps_the_key_for_the_next_one(cluster: Authority) -> None:
    first, second = send(cluster), send(cluster)
    assert started(cluster) == [first]
    cluster.worker("b", cpus=8000)
    cluster.lose("a")
    cluster.duty()
    assert (holders(cluster), cluster.row(second).state) == (1, "scheduled")
    if cluster.waits(first):
        cluster.bring_in(first)
    assert cluster.starts("b") == [first]
    end(cluster, first)
    assert cluster.starts("b") == [second]


def test_retry_lets_go_of_the_key_and_waits_for_it_again(cluster: Authority) -> None:
    first, second = send(cluster), send(cluster)
    assert started(cluster) == [first]
    row = cluster.row(first)
    cluster.republish(first, Token(row.epoch, row.attempt))
    end(cluster, first, "retried")
    # It is the older one, so it is first in line again.
    assert started(cluster) == [first]
    assert holders(cluster) == 1
    end(cluster, first)
    assert started(cluster) == [second]


def test_job_that_an_operator_repeats_has_the_same_limits(cluster: Authority) -> None:
    first, second = send(cluster), send(cluster)
    assert started(cluster) == [first]
    end(cluster, first, "failed")
    repeated = retry(cluster.app, cluster.stores, first)
    assert started(cluster) == [second]
    end(cluster, second)
    assert started(cluster) == [repeated]
    end(cluster, repeated)


def test_job_that_puts_itself_back_goes_behind(cluster: Authority) -> None:
    first, second = send(cluster), send(cluster)
    assert started(cluster) == [first]
    end(cluster, first, "requeued")
    cluster.duty()
    assert holders(cluster) == 1
    (running,) = started(cluster)
    end(cluster, running)
    cluster.stage.sql("UPDATE jobs SET not_before = now() WHERE state = 'scheduled'")
    cluster.duty()
    assert sorted([running, *started(cluster)]) == sorted([first, second])


def test_replaced_job_holds_no_key_until_it_goes_on(cluster: Authority) -> None:
    first = send(cluster)
    assert started(cluster) == [first]
    end(cluster, first, "replaced")
    second = send(cluster)
    assert started(cluster) == [second]
    with cluster.stage.engine.connect() as connection:
        limits = '{"key": {"most": 1}}'
        step = NewJob(first, TASK, SHAPE, b'{"body":"","properties":{"a":1}}', nesting=1, key_limits=limits)
        successors.put_successor(connection, step)
    cluster.duty()
    assert (started(cluster), cluster.row(first).state) == ([second], "scheduled")
    end(cluster, second)
    assert started(cluster) == [first]


def test_replacement_brings_its_own_limits(cluster: Authority) -> None:
    plain = str(cluster.app.send_task(TASK).id)
    holder = send(cluster)
    assert started(cluster) == [plain, holder]
    row = cluster.row(plain)
    with cluster.stage.engine.connect() as connection:
        step = NewJob(plain, TASK, SHAPE, b"{}", nesting=1, publisher=row.attempt, key_limits='{"key": {"most": 1}}')
        assert successors.put_successor(connection, step)
    end(cluster, plain, "replaced")
    cluster.duty()
    assert (cluster.row(plain).state, cluster.row(plain).due_at, holders(cluster)) == ("scheduled", None, 1)


def test_limits_hold_with_eta_and_after(cluster: Authority) -> None:
    first = send(cluster, {"first": 1})
    later, after = send(cluster, countdown=3600), send(cluster, after=first)
    free = send(cluster)
    assert started(cluster) == [first, free]
    end(cluster, first)
    cluster.duty()
    assert (started(cluster), cluster.row(after).needs) == ([free], 0)
    end(cluster, free)
    assert started(cluster) == [after]
    cluster.stage.sql("UPDATE jobs SET not_before = now() WHERE id = :id", id=later)
    cluster.duty()
    assert started(cluster) == [after]
    end(cluster, after)
    assert started(cluster) == [later]


def test_equal_unique_job_is_the_held_one(cluster: Authority) -> None:
    first, held = send(cluster), send(cluster, unique="same")
    assert send(cluster, unique="same") == held
    assert started(cluster) == [first]


def test_limit_holds_under_the_rate_of_its_task(cluster: Authority) -> None:
    cluster.app.control.broadcast("rate_limit", arguments={"task_name": TASK, "rate_limit": "1/h"})
    cluster.app.amqp.job_sender.rates.forget()
    wide = {"key": 10}
    first, second = send(cluster, wide), send(cluster, wide)
    cluster.duty()
    assert started(cluster) == [first]
    cluster.stage.sql("UPDATE rates SET counted_at = counted_at - interval '1 h'")
    cluster.duty()
    assert started(cluster) == [first, second]


def test_rate_of_a_key_lets_one_start_in_its_time(cluster: Authority) -> None:
    jobs = [send(cluster, rate={"key": "1/h"}) for _ in range(3)]
    other = send(cluster, rate={"other": "1/h"})
    cluster.duty()
    assert started(cluster) == [jobs[0], other]
    end(cluster, jobs[0])
    cluster.duty()
    assert started(cluster) == [other]
    cluster.stage.sql("UPDATE key_rates SET next_at = next_at - interval '1 h'")
    cluster.duty()
    assert started(cluster) == [jobs[1], other]


def test_many_of_one_call_wait_in_one_line(cluster: Authority) -> None:
    made = cluster.app.submit_many(TASK, [() for _ in range(50)], limit={"key": 3})
    assert started(cluster) == [made.id(n) for n in range(3)]
    for number in range(50):
        started(cluster)
        end(cluster, made.id(number))
    assert rows(cluster) == 0


def test_job_of_a_callers_transaction_is_held_by_its_key(cluster: Authority) -> None:
    holder = send(cluster)
    with Session(cluster.stores.engine.execution_options(isolation_level="READ COMMITTED")) as session:
        held = str(cluster.app.send_task(TASK, session=session, limit={"key": 1}).id)
        free = str(cluster.app.send_task(TASK, session=session, limit={"free": 1}).id)
        session.commit()
    cluster.duty()
    assert started(cluster) == [holder, free]
    end(cluster, holder)
    assert started(cluster) == [held, free] or started(cluster) == [free, held]


def test_concurrent_submissions_never_pass_the_limit(cluster: Authority) -> None:
    start = threading.Barrier(16)

    def submit(_: int) -> str:
        start.wait()
        return send(cluster, {"key": 3})

    with ThreadPoolExecutor(16) as threads:
        jobs = set(threads.map(submit, range(16)))
    cluster.duty()
    running = started(cluster)
    assert (len(running), set(running) <= jobs, holders(cluster)) == (3, True, 3)


def test_notes_that_a_crash_left_are_found_by_the_duty(cluster: Authority) -> None:
    first, second = send(cluster), send(cluster)
    assert started(cluster) == [first]
    # The process that ended it died right after its transaction, so nobody followed it up.
    cluster.end(first)
    cluster.stage.sql("UPDATE jobs SET due_at = NULL, state = 'scheduled' WHERE id = :id AND attempt = 0", id=second)
    cluster.duty()
    assert started(cluster) == [second]


def test_pass_without_jobs_that_wait_for_keys_makes_two_statements(engine: Engine) -> None:
    statements: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        assert key_limits.open_all(engine, 1.0) == []
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert len(statements) == 2


def test_deleted_job_holds_no_key(cluster: Authority) -> None:
    first = send(cluster)
    started(cluster)
    end(cluster, first)
    send(cluster, {"key": 1}, countdown=3600)
    assert rows(cluster) == 1
    cluster.stage.sql("DELETE FROM jobs")
    assert rows(cluster) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 2},
        {"limit": {"": 1}},
        {"limit": {"k" * 256: 1}},
        {"limit": {"a\nb": 1}},
        {"limit": {7: 1}},
        {"limit": {"key": 0}},
        {"limit": {"key": True}},
        {"limit": {"key": 1.5}},
        {"limit": {"key": 1_000_001}},
        {"limit": {f"key-{n}": 1 for n in range(9)}},
        {"rate": {"key": "often"}},
        {"rate": {"key": 0}},
        {"rate": {"key": 1e-9}},
        {"rate": "10/m"},
    ],
)
def test_invalid_limit_is_refused_and_nothing_is_written(cluster: Authority, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        cluster.app.send_task(TASK, **options)
    with cluster.stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 0


#: Held jobs of one key, in a hundred lines.
_MANY: Final = """
INSERT INTO jobs (id, name, state, shape, request, queue, message, key_limits)
SELECT 'held-' || n, 'task', 'scheduled', 'cpus=1000,slots=1', '{}', 'celery', 'message',
  jsonb_build_object('key', '{"most": 2}'::jsonb, 'other-' || n % 100, '{"most": 1}'::jsonb)
FROM generate_series(1, 20000) n
"""
_READ: Final = """
SELECT sum(seq_tup_read)::int, sum(idx_tup_fetch)::int FROM pg_stat_xact_user_tables
WHERE relname IN ('jobs', 'job_keys')
"""


def test_end_of_a_holder_reads_few_rows_of_a_long_line(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # A session keeps the plans that it made while the tables were empty.
        for _ in range(8):
            connection.exec_driver_sql(_MANY.replace("20000", "3").replace("%", "%%"))
            connection.exec_driver_sql("SELECT open_keys(ARRAY['key'], 1, 500)")
            connection.exec_driver_sql("DELETE FROM jobs")
        connection.exec_driver_sql(_MANY.replace("%", "%%"))
        connection.exec_driver_sql("TRUNCATE key_notes")
        connection.exec_driver_sql("BEGIN")
        before = connection.exec_driver_sql(_READ).one()
        went = connection.exec_driver_sql("SELECT open_keys(ARRAY['key'], 1, 500)").scalars().all()
        read = connection.exec_driver_sql(_READ).one()
        connection.exec_driver_sql("ROLLBACK")
        assert sorted(went) == ["held-1", "held-2"]
        # A hundred lines have three rows of their first job, and ten of the next ones each.
        assert (read[0] - before[0], read[1] - before[1] < 6000) == (0, True)
        connection.exec_driver_sql("DELETE FROM jobs")


#: Jobs of one line.
_LINE: Final = """
INSERT INTO jobs (id, name, state, shape, request, queue, message, key_limits)
SELECT 'held-' || n, 'task', 'scheduled', 'cpus=1000,slots=1', '{}', 'celery', 'message', '{"key": {"most": 2}}'
FROM generate_series(%s, %s) n
"""
_END: Final = """
DELETE FROM jobs WHERE id = (SELECT job FROM job_keys WHERE key = 'key' AND phase = 'holds' LIMIT 1)
"""


def test_plans_made_beside_few_rows_stay_good_in_a_long_line(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for first, last in ((1, 300), (301, 3000)):
            connection.exec_driver_sql(_LINE, (first, last))
            for _ in range(8):
                connection.exec_driver_sql(_END)
                connection.exec_driver_sql("BEGIN")
                before = connection.exec_driver_sql(_READ).one()
                connection.exec_driver_sql("SELECT open_keys(ARRAY['key'], 1, 500)")
                read = connection.exec_driver_sql(_READ).one()
                connection.exec_driver_sql("COMMIT")
            assert (read[0] - before[0], read[1] - before[1] < 100) == (0, True)
        connection.exec_driver_sql("DELETE FROM jobs")


STEPS: Final = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(
            ["submit", "submit", "end", "end", "retry", "requeue", "cancel", "lose", "duty", "note"]
        ),
        strategies.integers(0, 7),
    ),
    max_size=40,
)
LIMITS: Final = ({"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 2}, {"b": 3}, {"a": 3, "c": 1}, {"c": 2}, {"a": 2, "b": 1})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_holders_stay_within_limits_and_none_waits_in_vain(cluster: Authority, steps: list[tuple[str, int]]) -> None:
    # Nobody beats for the worker, and all examples together may take longer than its lease.
    cluster.wake("a")
    retried: set[str] = set()
    for step, number in steps:
        running = started(cluster)
        before = _held(cluster)
        if step == "submit":
            send(cluster, LIMITS[number], priority=number % 3)
        elif step == "duty":
            cluster.duty()
        elif step == "note":
            key_limits.open_noted(cluster.stage.engine)
        elif running:
            job = running[number % len(running)]
            if step == "retry" and job in retried:
                # Here all retries have one message. Two of a job differ in truth, and a second one looks like a repeat.
                continue
            retried |= {job} if step == "retry" else set()
            _step(cluster, step, job)
            if step in ("retry", "requeue"):
                # It let go, and may hold its keys again already, behind one that came in between.
                before.pop(job, None)
        _check(before, _held(cluster))
    cluster.stage.sql("UPDATE jobs SET not_before = now() WHERE not_before > now()")
    cluster.duty()
    cluster.duty()
    _check_none_in_vain(cluster)
    # Let all come to their end, for the next example and for the check of the books.
    while running := started(cluster):
        for job in running:
            end(cluster, job)
    assert rows(cluster) == 0


def _step(cluster: Authority, step: str, job: str) -> None:
    row = cluster.row(job)
    if step == "retry":
        cluster.republish(job, Token(row.epoch, row.attempt))
        end(cluster, job, "retried")
    elif step == "cancel":
        cluster.revoke(job)
        end(cluster, job, "cancelled")
    elif step == "lose":
        end(cluster, job, "lost")
    else:
        end(cluster, job, "requeued" if step == "requeue" else "succeeded")


def _held(cluster: Authority) -> dict[str, dict[str, int]]:
    """Return the limits of the jobs that hold keys, by job, from the rows of the jobs themselves."""
    query = text("""
        SELECT id, key_limits FROM jobs WHERE key_limits IS NOT NULL AND finished_at IS NULL AND state <> 'replaced'
          AND NOT (state = 'scheduled' AND due_at IS NULL) ORDER BY seq
    """)
    with cluster.stage.engine.connect() as connection:
        return {
            job: {key: fields["most"] for key, fields in limits.items()} for job, limits in connection.execute(query)
        }


def _check(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
    """Check that the jobs that started since were within their own limits, in some order."""
    new = [job for job in after if job not in before]
    for job in new:
        for key, most in after[job].items():
            others = sum(key in after[other] for other in after if other != job)
            started_later = sum(key in after[other] for other in new if other != job)
            assert others - started_later < most, (job, before, after)


def _check_none_in_vain(cluster: Authority) -> None:
    held = _held(cluster)
    query = text("SELECT id, key_limits FROM jobs WHERE state = 'scheduled' AND due_at IS NULL")
    with cluster.stage.engine.connect() as connection:
        for job, limits in connection.execute(query):
            full = [sum(key in other for other in held.values()) >= fields["most"] for key, fields in limits.items()]
            assert any(full), (job, limits, held)
