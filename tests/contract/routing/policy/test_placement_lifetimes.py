"""A job goes to a worker that outlives it: the scripts and Postgres decide as the policy does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.expected import UNKNOWN, RunTime, expected_class
from celery_capacity.routing.model.request import Request, run_time_of, timed
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import (
    CANDIDATES,
    MAX_ADMITTED,
    TOP_PRIORITY,
    Admission,
    Book,
    Waiting,
    choose,
    order,
)
from celery_capacity.routing.store import claims
from tests.contract.routing.ledger.test_admission import WRITTEN, delivered, write
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW

#: Each example takes some milliseconds of a server.
ON_A_SERVER: Final = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MINUTE, HOUR = 60_000, 3_600_000
#: Lives that have a long or a short end, or none. All times lie far from these ends, however slow the server is.
LIVES: Final = st.sampled_from([None, 10 * MINUTE, 10 * HOUR])
RUN_TIMES: Final = st.sampled_from(
    [
        UNKNOWN,
        RunTime(MINUTE, MINUTE),
        RunTime(MINUTE, HOUR),
        RunTime(HOUR, HOUR),
        RunTime(HOUR, 30 * HOUR),
        RunTime(30 * HOUR, 30 * HOUR),
    ]
).map(lambda run_time: RunTime(*map(expected_class, run_time)))
REQUESTS: Final = st.builds(
    lambda cpus, memory, queue: Request.of({"cpus": cpus, "memory": memory}).within(queue),
    st.sampled_from([0, 1000, 2000]),
    st.sampled_from([0, 0, 2]),
    st.sampled_from([DEFAULT_QUEUE, DEFAULT_QUEUE, "mail"]),
)
CAPACITIES: Final = st.builds(
    lambda cpus, memory, slots, queues: {"cpus": cpus, "memory": memory, "slots": slots, **labels(queues)},
    st.sampled_from([1000, 2000, 4000]),
    st.sampled_from([2, 4]),
    st.integers(1, 4),
    st.sampled_from([(DEFAULT_QUEUE,), (DEFAULT_QUEUE, "mail"), ("mail",)]),
)
BOOKS: Final = st.lists(
    st.builds(
        lambda name, capacity, left: Book(f"w{name}", capacity, {}, left=left), st.integers(1, 40), CAPACITIES, LIVES
    ),
    min_size=2,
    max_size=8,
    unique_by=lambda book: book.worker,
)
BACKLOG: Final = st.lists(st.tuples(REQUESTS, RUN_TIMES, st.integers(0, TOP_PRIORITY)), min_size=1, max_size=16).map(
    lambda jobs: [
        Waiting(f"job-{seq}", request, order(rank, seq + 1), run_time=run_time)
        for seq, (request, run_time, rank) in enumerate(jobs)
    ]
)


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(900))
@given(BOOKS, BACKLOG)
def test_submits_go_where_the_policy_says_one_after_another(
    ledger: Ledger, books: list[Book], jobs: list[Waiting]
) -> None:
    write(ledger, books)
    for job in jobs:
        decision = choose(job.request, books, CANDIDATES, bound=job.run_time.bound)
        submitted = ledger.submit(job.job, job.shape, job.order, MESSAGE)
        assert submitted.worker == (decision.worker if isinstance(decision, Admission) else None)
        books = [book.holding(job.request) if book.worker == submitted.worker else book for book in books]


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(400))
@given(BOOKS, BACKLOG)
def test_many_submits_at_once_go_where_the_policy_says(ledger: Ledger, books: list[Book], jobs: list[Waiting]) -> None:
    write(ledger, books)
    expected: dict[str, list[str]] = {book.worker: [] for book in books}
    for job in jobs:
        decision = choose(job.request, books, CANDIDATES, bound=job.run_time.bound)
        if isinstance(decision, Admission):
            expected[decision.worker].append(job.job)
            books = [book.holding(job.request) if book.worker == decision.worker else book for book in books]
    ledger.submit_many([(job.job, job.shape, job.order, MESSAGE, 0, 0, 0) for job in jobs])
    assert {worker: delivered(ledger.client, f"queue.{worker}") for worker in expected} == expected


@settings(ON_A_SERVER, max_examples=examples(800))
@given(BACKLOG, CAPACITIES, LIVES)
def test_release_admits_what_the_policy_fills_in_with(
    ledger: Ledger, backlog: list[Waiting], capacity: dict[str, int], left: int | None
) -> None:
    write(ledger, [])
    whole = Capacity.of(capacity)
    ledger.register("w", "life", "queue", whole.shape, VIEW, left_ms=left)
    resources = {name: amount for name, amount in capacity.items() if name in ("cpus", "memory", "slots")}
    first = Request.of(resources).within(whole.queues[0])
    assert ledger.submit("first", first.shape, order(9, 0), MESSAGE).worker == "w"
    for job in backlog:
        assert ledger.submit(job.job, job.shape, job.order, MESSAGE).state == "waiting"
    ledger.client.delete("queue")
    ledger.settle("w", "life", ended=[Ended("first", Token(1, 1), Outcome.SUCCEEDED)], most_losses=MOST_LOSSES)
    filled = fill_or_keep(Book("w", capacity, {}, left=left), backlog, MAX_ADMITTED).admitted
    assert delivered(ledger.client, "queue") == [job.job for job in filled]


@settings(ON_A_SERVER, max_examples=examples(800))
@given(BACKLOG, CAPACITIES, LIVES)
def test_look_into_postgres_finds_what_the_policy_fills_in_with(
    engine: Engine, backlog: list[Waiting], capacity: dict[str, int], left: int | None
) -> None:
    _insert(engine, backlog)
    book = Book("w", capacity, {}, left=left)
    with engine.connect() as connection:
        chosen = [row.job for row in claims.look(connection, book, MOST_LOSSES)]
    assert chosen == [job.job for job in fill_or_keep(book, backlog, MAX_ADMITTED).admitted]


def _insert(engine: Engine, backlog: Sequence[Waiting]) -> None:
    """Have these jobs wait in Postgres, and no others."""
    rows: list[dict[str, Any]] = []
    for job in backlog:
        level, seq = divmod(job.order, order(TOP_PRIORITY - 1, 0))
        rows.append(
            {"id": job.job, "shape": job.shape, "priority": TOP_PRIORITY - level, "seq": seq, "message": MESSAGE}
        )
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM jobs"))
        connection.execute(
            text(
                "INSERT INTO jobs (id, seq, name, state, priority, shape, request, queue, message)"
                " VALUES (:id, :seq, 'celery.task', 'waiting', :priority, :shape, '{}', 'celery', :message)"
            ),
            rows,
        )


def test_job_is_admitted_once_a_worker_that_outlives_it_comes(ledger: Ledger) -> None:
    shape = timed(Request.of({"cpus": 1000}).shape, RunTime(HOUR, HOUR))
    capacity = Request.of({"cpus": 4000, "slots": 4}).shape
    ledger.register("short", "short-life", "queue.short", capacity, VIEW, left_ms=HOUR // 2)
    assert ledger.submit("job", shape, order(0, 1), MESSAGE).state == "waiting"
    assert list(ledger.find_room()) == []
    ledger.register("long", "long-life", "queue.long", capacity, VIEW, left_ms=2 * HOUR)
    assert delivered(ledger.client, "queue.long") == ["job"]
    assert delivered(ledger.client, "queue.short") == []


def test_worker_is_kept_for_no_job_that_it_would_not_outlive(ledger: Ledger) -> None:
    alone = Request.of({"cpus": 1000, "alone": 1}).shape
    shape = timed(alone, RunTime(HOUR, HOUR))
    ledger.register("w", "life", "queue", Request.of({"cpus": 4000, "slots": 4}).shape, VIEW, left_ms=HOUR // 2)
    assert ledger.submit("first", Request.of({"cpus": 1000}).shape, order(0, 1), MESSAGE).worker == "w"
    assert ledger.submit("last-try", shape, order(9, 2), MESSAGE, losses=MOST_LOSSES - 1).state == "waiting"
    ledger.fill("w")
    assert ledger.client.hgetall(keys.KEYS["kept"]) == {}
    assert ledger.submit("second", Request.of({"cpus": 2000}).shape, order(0, 3), MESSAGE).worker == "w"


@pytest.mark.parametrize("run_time", [UNKNOWN, RunTime(MINUTE, MINUTE), RunTime(MINUTE, HOUR)])
def test_book_of_the_policy_lasts_for_the_bound(run_time: RunTime) -> None:
    classes = run_time_of(timed("slots=1", run_time))
    assert Book("w", {}, {}, left=30 * MINUTE).lasts(classes.bound) is (run_time.bound < 30 * MINUTE)
    assert Book("w", {}, {}).lasts(classes.bound)
