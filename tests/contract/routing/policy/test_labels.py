"""A job goes where its place allows: the scripts and Postgres decide as the policy does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.labels import Place, parse_where
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
from celery_capacity.routing.recovery.workers_with_room import fill_all
from celery_capacity.routing.store import claims
from tests.contract.routing.ledger.test_admission import WRITTEN, delivered
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW

ON_A_SERVER: Final = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
GIB: Final = 2**30
LABELS: Final = st.fixed_dictionaries(
    {},
    optional={
        "arch": st.sampled_from(["x86", "arm"]),
        "a.b-c": st.sampled_from(["x86", "x", "8"]),
        "mem": st.sampled_from(["2", "10", "-3", "2.5", "much", "8.0.1", "1e1", "0x10", "."]),
    },
)
WHERES: Final = st.fixed_dictionaries(
    {},
    optional={
        "arch": st.sampled_from(["x86", "!=x86", "in arm,ppc", ["arm", "x86"], "!=arm,x86"]),
        "a.b-c": st.sampled_from(["x86", "!=x", "<=8"]),
        "mem": st.sampled_from([">=2", ">2", "<10", "<=2.5", ">=-3", 10, "!=much"]),
    },
).map(parse_where)
PLACES: Final = st.builds(
    Place, st.one_of(st.just(()), WHERES), st.sampled_from(["", "", "", "w1", "w2"]), st.just(False), st.booleans()
)
REQUESTS: Final = st.builds(
    lambda cpus, memory, licence, queue: Request.of(
        {"cpus": cpus, "memory": memory * GIB, "licence": licence if queue == DEFAULT_QUEUE else 0}
    ).within(queue),
    st.sampled_from([0, 1000, 2000]),
    st.sampled_from([0, 0, 1, 3]),
    st.sampled_from([0, 0, 1, 3]),
    st.sampled_from([DEFAULT_QUEUE, DEFAULT_QUEUE, DEFAULT_QUEUE, "mail"]),
)
CAPACITIES: Final = st.builds(
    lambda cpus, memory, licence, slots, queues: {
        "cpus": cpus,
        "memory": memory * GIB,
        "slots": slots,
        **labels(queues),
        **({"licence": licence} if licence else {}),
    },
    st.sampled_from([1000, 2000, 4000, 4000]),
    st.sampled_from([2, 4, 9]),
    st.sampled_from([0, 1, 5]),
    st.integers(1, 4),
    st.sampled_from([(DEFAULT_QUEUE,), (DEFAULT_QUEUE,), (DEFAULT_QUEUE, "mail"), ("mail",)]),
)
BOOKS: Final = st.lists(
    st.builds(
        lambda name, capacity, labels: Book(f"w{name}", capacity, {}, labels=labels),
        st.integers(1, 20),
        CAPACITIES,
        LABELS,
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda book: book.worker,
)


def _backlog(jobs: Sequence[tuple[Request, Place, int]]) -> list[Waiting]:
    return [
        Waiting(f"job-{seq}", request, order(rank, seq + 1), terms=place.terms)
        for seq, (request, place, rank) in enumerate(jobs)
    ]


BACKLOG: Final = st.lists(st.tuples(REQUESTS, PLACES, st.integers(0, TOP_PRIORITY)), min_size=1, max_size=16).map(
    _backlog
)


def register(ledger: Ledger, books: Sequence[Book]) -> None:
    """Make the ledger anew, and register these workers in it."""
    ledger.client.flushdb()
    ledger.open_epoch(1)
    ledger.finish_epoch(1)
    for book in books:
        capacity = Capacity.of(book.capacity).shape
        ledger.register(book.worker, f"{book.worker}-life", f"queue.{book.worker}", capacity, VIEW, labels=book.labels)


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(2500))
@given(BOOKS, BACKLOG)
def test_submits_go_where_the_policy_says_by_labels(ledger: Ledger, books: list[Book], jobs: list[Waiting]) -> None:
    register(ledger, books)
    for job in jobs:
        decision = choose(job.request, books, CANDIDATES, terms=job.terms)
        submitted = ledger.submit(job.job, job.shape, job.order, MESSAGE)
        assert submitted.worker == (decision.worker if isinstance(decision, Admission) else None), job
        books = [book.holding(job.request) if book.worker == submitted.worker else book for book in books]


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(800))
@given(BOOKS, BACKLOG)
def test_many_submits_go_where_the_policy_says_by_labels(
    ledger: Ledger, books: list[Book], jobs: list[Waiting]
) -> None:
    register(ledger, books)
    expected: dict[str, list[str]] = {book.worker: [] for book in books}
    for job in jobs:
        decision = choose(job.request, books, CANDIDATES, terms=job.terms)
        if isinstance(decision, Admission):
            expected[decision.worker].append(job.job)
            books = [book.holding(job.request) if book.worker == decision.worker else book for book in books]
    ledger.submit_many([(job.job, job.shape, job.order, MESSAGE, 0, 0, 0) for job in jobs])
    assert {worker: delivered(ledger.client, f"queue.{worker}") for worker in expected} == expected


@settings(ON_A_SERVER, max_examples=examples(1200))
@given(BACKLOG, CAPACITIES, LABELS, st.integers(0, 15))
def test_release_admits_what_the_policy_fills_in_with_by_labels(
    ledger: Ledger, backlog: list[Waiting], capacity: dict[str, int], worker_labels: dict[str, str], exclusive: int
) -> None:
    # An exclusive job is among them, so that the worker may be kept for it.
    for number in range(exclusive, len(backlog), 16):
        job = backlog[number]
        request = Request.of({**dict(job.request.amounts), "alone": 1})
        backlog[number] = Waiting(job.job, request, job.order, terms=Place(exclusive=True).terms)
    book = Book("w1", capacity, {}, labels=worker_labels)
    register(ledger, [book])
    whole = Capacity.of(capacity)
    resources = {name: amount for name, amount in capacity.items() if name in ("cpus", "memory", "slots")}
    first = Request.of(resources).within(whole.queues[0])
    assert ledger.submit("first", first.shape, order(9, 0), MESSAGE).worker == "w1"
    for job in backlog:
        assert ledger.submit(job.job, job.shape, job.order, MESSAGE).state == "waiting"
    ledger.client.delete("queue.w1")
    ledger.settle("w1", "w1-life", ended=[Ended("first", Token(1, 1), Outcome.SUCCEEDED)], most_losses=MOST_LOSSES)
    filling = fill_or_keep(book, backlog, MAX_ADMITTED)
    assert delivered(ledger.client, "queue.w1") == [job.job for job in filling.admitted]
    kept = ledger.client.hget(keys.book("w1"), "kept")
    assert (snapshot.text(kept) if kept else "") == filling.kept


@settings(ON_A_SERVER, max_examples=examples(800))
@given(BACKLOG, CAPACITIES, LABELS)
def test_look_into_postgres_finds_what_the_policy_fills_in_by_labels(
    engine: Engine, backlog: list[Waiting], capacity: dict[str, int], worker_labels: dict[str, str]
) -> None:
    _insert(engine, backlog)
    book = Book("w1", capacity, {}, labels=worker_labels)
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


ROOM: Final = Request.of({"cpus": 4000, "slots": 4}).shape
ARM: Final = Request.of({"cpus": 1000}).shape + Place(where=parse_where({"arch": "arm"})).terms


def test_job_is_admitted_once_its_worker_has_other_labels(ledger: Ledger) -> None:
    register(ledger, [])
    ledger.register("w", "life", "queue.w", ROOM, VIEW, labels={"arch": "x86"})
    assert ledger.submit("job", ARM, order(0, 1), MESSAGE).state == "waiting"
    assert list(ledger.find_room()) == []
    ledger.leave("w", "life")
    ledger.register("w", "next", "queue.w2", ROOM, VIEW, labels={"arch": "arm"})
    assert delivered(ledger.client, "queue.w2") == ["job"]


def test_named_worker_is_found_behind_more_workers_than_a_search_sees(ledger: Ledger) -> None:
    register(ledger, [])
    for number in range(CANDIDATES + 10):
        ledger.register(f"w{number:03}", f"life-{number}", f"queue.{number}", ROOM, VIEW)
    last = f"w{CANDIDATES + 9:03}"
    shape = Request.of({"cpus": 1000}).shape + Place(worker=last).terms
    assert ledger.submit("job", shape, order(0, 1), MESSAGE).worker == last


def test_spread_jobs_go_to_as_many_workers_as_there_are(ledger: Ledger) -> None:
    register(ledger, [])
    names = [f"w{number:02}" for number in range(CANDIDATES + 10)]
    for name in names:
        ledger.register(name, f"{name}-life", f"queue.{name}", ROOM, VIEW)
    shape = Request.of({"cpus": 1000}).shape + Place(spread=True).terms
    workers = {ledger.submit(f"job-{n}", shape, order(0, n + 1), MESSAGE).worker for n in range(len(names))}
    assert workers == set(names)


def test_spread_job_behind_full_memory_is_found_by_the_cursor(ledger: Ledger) -> None:
    """Far more workers than one search looks at have the most CPUs, and too little memory."""
    register(ledger, [])
    for number in range(3 * CANDIDATES):
        ledger.register(
            f"w{number:03}",
            f"life-{number}",
            f"queue.{number}",
            Capacity.of({"cpus": 8000, "memory": 5 * GIB + 1, "slots": 4}).shape,
            VIEW,
        )
    large = Capacity.of({"cpus": 4000, "memory": 5 * GIB + 4096, "slots": 4}).shape
    ledger.register("large", "life", "queue.large", large, VIEW)
    shape = Request.of({"cpus": 1000, "memory": 5 * GIB + 4096}).shape + Place(spread=True).terms
    ledger.submit("job", shape, order(0, 1), MESSAGE)
    fill_all(ledger)
    assert delivered(ledger.client, "queue.large") == ["job"]
