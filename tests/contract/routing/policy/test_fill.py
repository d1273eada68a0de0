"""A job takes the first alternative with room: the scripts and Postgres decide as the policy does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from celery_capacity.routing.database import tenants
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.amounts import labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.fill import choose_alternative, fill_or_keep
from celery_capacity.routing.policy.labels import Place
from celery_capacity.routing.policy.placement import (
    CANDIDATES,
    MAX_ADMITTED,
    TOP_PRIORITY,
    Admission,
    Book,
    Waiting,
    order,
)
from celery_capacity.routing.policy.tenants import Sharing
from celery_capacity.routing.recovery.workers_with_room import fill_all
from celery_capacity.routing.store import claims
from tests.contract.routing.ledger.test_admission import WRITTEN, delivered, vectors, write
from tests.contract.routing.policy.test_labels import ON_A_SERVER, _insert, register
from tests.contract.routing.policy.test_tenants import BACKLOG as TENANTS_BACKLOG
from tests.contract.routing.policy.test_tenants import SERVED, SHARINGS, flat, read_used, write_sharing
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW

GIB: Final = 2**30
ONE: Final = st.builds(
    lambda cpus, memory, licence, gpus: Request.of(
        {"cpus": cpus, "memory": memory * GIB, "licence": licence, "gpus": gpus}
    ),
    st.sampled_from([0, 1000, 2000, 4000]),
    st.sampled_from([0, 0, 1, 3]),
    st.sampled_from([0, 0, 1, 3]),
    st.sampled_from([0, 0, 1, 2]),
)
SEVERAL: Final = st.lists(ONE, min_size=1, max_size=4, unique=True)
PLACES: Final = st.builds(
    lambda worker, exclusive, spread, tenant: (Place((), worker, exclusive, spread), tenant),
    st.sampled_from(["", "", "", "w1", "w2"]),
    st.sampled_from([False, False, False, True]),
    st.booleans(),
    st.sampled_from(["", "", ",$physics"]),
)
CAPACITIES: Final = st.builds(
    lambda cpus, memory, slots, others: {"cpus": cpus, "memory": memory * GIB, "slots": slots, **others},
    st.sampled_from([1000, 2000, 4000, 8000]),
    st.sampled_from([2, 4, 9]),
    st.integers(1, 4),
    st.sampled_from([{}, {"gpus": 1}, {"gpus": 2}, {"licence": 2}, {"licence": 5, "gpus": 1}]),
)
BOOKS: Final = st.lists(
    st.builds(lambda name, capacity: Book(f"w{name}", capacity, {}), st.integers(1, 20), CAPACITIES),
    min_size=1,
    max_size=8,
    unique_by=lambda book: book.worker,
)


def _waiting(seq: int, requests: Sequence[Request], place: tuple[Place, str], rank: int) -> Waiting:
    location, tenant = place
    alone = {"alone": 1} if location.exclusive else {}
    asked = [Request.of({**dict(request.amounts), **alone}) for request in requests]
    terms = alternatives_term(asked) + location.terms + tenant
    return Waiting(f"job-{seq}", asked[0], order(rank, seq + 1), terms=terms)


def _backlog(jobs: Sequence[tuple[list[Request], tuple[Place, str], int]]) -> list[Waiting]:
    return [_waiting(seq, *job) for seq, job in enumerate(jobs)]


BACKLOG: Final = st.lists(st.tuples(SEVERAL, PLACES, st.integers(0, TOP_PRIORITY)), min_size=1, max_size=12).map(
    _backlog
)
#: Without exclusive jobs, which may have a worker kept for them.
PACKED: Final = BACKLOG.map(lambda jobs: [job for job in jobs if not job.request.get("alone")])


def held_shape(ledger: Ledger, job: str) -> str:
    """Return the shape that the ledger has of a job."""
    return snapshot.read_cards(ledger.client, [job])[job].shape or ""


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(900))
@given(BOOKS, PACKED)
def test_submits_take_the_alternative_that_the_policy_says(
    ledger: Ledger, books: list[Book], jobs: list[Waiting]
) -> None:
    register(ledger, books)
    for job in jobs:
        starting, decision = choose_alternative(job, books, CANDIDATES)
        submitted = ledger.submit(job.job, job.shape, job.order, MESSAGE)
        assert submitted.worker == (decision.worker if isinstance(decision, Admission) else None), job
        if submitted.worker:
            assert held_shape(ledger, job.job) == starting.held_shape
        books = [book.holding(starting.request) if book.worker == submitted.worker else book for book in books]
    policy = {book.worker: {name: amount for name, amount in book.allocated.items() if amount} for book in books}
    ledger_books = snapshot.read_books(ledger.client, policy)
    allocated = {name: {n: a for n, a in book.allocated.items() if a} for name, book in ledger_books.items()}
    assert allocated == policy


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(900))
@given(BOOKS, PACKED, SHARINGS)
def test_submits_start_what_the_quota_of_their_tenant_allows(
    ledger: Ledger, books: list[Book], jobs: list[Waiting], sharing: Sharing
) -> None:
    register(ledger, books)
    write_sharing(ledger, sharing)
    for job in jobs:
        starting, decision = choose_alternative(job, books, CANDIDATES, sharing)
        submitted = ledger.submit(job.job, job.shape, job.order, MESSAGE)
        assert submitted.worker == (decision.worker if isinstance(decision, Admission) else None), job
        if submitted.worker:
            assert held_shape(ledger, job.job) == starting.held_shape
            books = [book.holding(starting.request) if book.worker == submitted.worker else book for book in books]
            sharing = sharing.holding(job.shape, starting.request)
    assert read_used(ledger) == flat(sharing.used)
    # The use at the beginning is nobody's.
    ledger.client.delete(keys.USED)
    write(ledger, [])


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(600))
@given(BOOKS, PACKED)
def test_many_submits_take_the_alternatives_that_the_policy_says(
    ledger: Ledger, books: list[Book], jobs: list[Waiting]
) -> None:
    register(ledger, books)
    expected: dict[str, list[str]] = {book.worker: [] for book in books}
    for job in jobs:
        starting, decision = choose_alternative(job, books, CANDIDATES)
        if isinstance(decision, Admission):
            expected[decision.worker].append(starting.job)
            books = [book.holding(starting.request) if book.worker == decision.worker else book for book in books]
    ledger.submit_many([(job.job, job.shape, job.order, MESSAGE, 0, 0, 0) for job in jobs])
    assert {worker: delivered(ledger.client, f"queue.{worker}") for worker in expected} == expected


@settings(ON_A_SERVER, max_examples=examples(900))
@given(BACKLOG, CAPACITIES)
def test_release_takes_the_alternatives_of_the_policys_pass(
    ledger: Ledger, backlog: list[Waiting], capacity: dict[str, int]
) -> None:
    backlog = [replace(job, terms=job.terms.replace(",$physics", "")) for job in backlog]
    book = Book("w1", capacity, {})
    register(ledger, [book])
    first = Request.of({name: amount for name, amount in capacity.items() if name in ("cpus", "memory", "slots")})
    assert ledger.submit("first", first.shape, order(9, 0), MESSAGE).worker == "w1"
    for job in backlog:
        assert ledger.submit(job.job, job.shape, job.order, MESSAGE).state == "waiting"
    ledger.client.delete("queue.w1")
    ledger.settle("w1", "w1-life", ended=[Ended("first", Token(1, 1), Outcome.SUCCEEDED)], most_losses=MOST_LOSSES)
    filling = fill_or_keep(book, backlog, MAX_ADMITTED)
    assert delivered(ledger.client, "queue.w1") == [job.job for job in filling.admitted]
    assert [held_shape(ledger, job.job) for job in filling.admitted] == [job.held_shape for job in filling.admitted]
    kept = ledger.client.hget(keys.book("w1"), "kept")
    assert (snapshot.text(kept) if kept else "") == filling.kept


@settings(ON_A_SERVER, max_examples=examples(600))
@given(PACKED, CAPACITIES)
def test_pull_takes_the_alternatives_of_the_policys_pass(
    engine: Engine, backlog: list[Waiting], capacity: dict[str, int]
) -> None:
    backlog = [replace(job, terms=job.terms.replace(",$physics", "")) for job in backlog]
    if not backlog:
        return
    _insert(engine, backlog)
    book = Book("w1", capacity, {})
    with engine.connect() as connection:
        chosen = claims.look(connection, book, MOST_LOSSES)
    admitted = fill_or_keep(book, backlog, MAX_ADMITTED).admitted
    assert [(row.job, row.held or row.shape) for row in chosen] == [(job.job, job.held_shape) for job in admitted]


@settings(ON_A_SERVER, max_examples=examples(600))
@given(TENANTS_BACKLOG, vectors(st.integers(1, 9)), SHARINGS)
def test_pull_takes_the_alternatives_of_the_policys_pass_among_tenants(
    engine: Engine, backlog: list[Waiting], capacity: dict[str, int], sharing: Sharing
) -> None:
    if not backlog:
        return
    _insert(engine, backlog)
    book = Book("w1", {**capacity, **labels(SERVED)}, {})
    with engine.connect() as connection, patch.object(tenants, "sharing_in_use", lambda _: sharing):
        chosen = claims.look(connection, book, MOST_LOSSES)
    admitted = fill_or_keep(book, backlog, MAX_ADMITTED, sharing=sharing).admitted
    assert [(row.job, row.held or row.shape) for row in chosen] == [(job.job, job.held_shape) for job in admitted]


GPU: Final = Request.of({"cpus": 1000, "gpus": 1})
WIDE: Final = Request.of({"cpus": 4000})
TERM: Final = alternatives_term([GPU, WIDE])


def test_lost_job_waits_again_for_all_its_alternatives(ledger: Ledger) -> None:
    register(ledger, [])
    ledger.register("w", "life", "queue.w", Capacity.of({"cpus": 4000, "slots": 4}).shape, VIEW)
    waits = GPU.shape + TERM
    assert ledger.submit("job", waits, order(0, 1), MESSAGE).worker == "w"
    assert held_shape(ledger, "job") == f"{WIDE.shape},|2{TERM[1:]}"
    ended = [Ended("job", Token(1, 1), Outcome.HANDED_BACK)]
    ledger.register("gpu", "life-2", "queue.g", Capacity.of({"cpus": 4000, "slots": 4, "gpus": 1}).shape, VIEW)
    ledger.settle("w", "life", ended=ended, most_losses=MOST_LOSSES, admit=False)
    fill_all(ledger)
    (message,) = ledger.client.lrange("queue.g", 0, -1)
    assert json.loads(message)["properties"]["delivery_tag"] == "job:1.2/1"
    assert held_shape(ledger, "job") == f"{GPU.shape},|1{TERM[1:]}"
    assert snapshot.read_books(ledger.client, ["w"])["w"].allocated.get("cpus", 0) == 0


def test_later_alternative_is_found_behind_more_workers_than_a_search_sees(ledger: Ledger) -> None:
    """All workers have the GPU's CPUs, and none the memory, until a second alternative is looked at."""
    register(ledger, [])
    for number in range(3 * CANDIDATES):
        small = Capacity.of({"cpus": 4000, "memory": GIB, "slots": 4, "gpus": 1}).shape
        ledger.register(f"w{number:03}", f"life-{number}", f"queue.{number}", small, VIEW)
    many = Request.of({"cpus": 1000, "memory": 2 * GIB, "gpus": 1})
    shape = many.shape + alternatives_term([many, WIDE])
    assert ledger.submit("job", shape, order(0, 1), MESSAGE).worker == "w000"


def test_quota_leaves_an_alternative_that_it_allows(ledger: Ledger) -> None:
    register(ledger, [])
    ledger.register("w", "life", "queue.w", Capacity.of({"cpus": 8000, "slots": 4, "gpus": 2}).shape, VIEW)
    ledger.client.hset(keys.KEYS["tenants"], "physics", "1;;gpus=1")
    shape = f"{GPU.shape}{TERM},$physics"
    assert [ledger.submit(f"job-{n}", shape, order(0, n), MESSAGE).worker for n in (1, 2)] == ["w", "w"]
    assert [held_shape(ledger, f"job-{n}").split(",|")[0] for n in (1, 2)] == [GPU.shape, WIDE.shape]
    assert snapshot.text(ledger.client.hget(keys.KEYS["used"], "physics/cpus")) == "5000"


def test_quota_leaves_the_last_of_three_alternatives_to_a_batch(ledger: Ledger) -> None:
    register(ledger, [])
    ledger.register("w", "life", "queue.w", Capacity.of({"cpus": 8000, "slots": 4, "gpus": 2}).shape, VIEW)
    ledger.client.hset(keys.KEYS["tenants"], "physics", "1;;gpus=0")
    small = Request.of({"cpus": 1000})
    requests = [GPU, Request.of({"cpus": 2000, "gpus": 2}), small]
    shape = f"{GPU.shape}{alternatives_term(requests)},$physics"
    jobs = ["job-1", "job-2", "job-3"]
    ledger.submit_many([(job, shape, order(0, n), MESSAGE, 0, 0, 0) for n, job in enumerate(jobs)])
    assert delivered(ledger.client, "queue.w") == jobs
    assert {held_shape(ledger, job).split(",|")[0] for job in jobs} == {small.shape}


def test_row_has_the_held_alternative_and_waits_for_all_again(engine: Engine) -> None:
    waiting = Waiting("job", GPU, order(0, 1), terms=TERM)
    _insert(engine, [waiting])
    book = Book("w", {"cpus": 4000, "slots": 4}, {})
    with engine.begin() as connection:
        connection.execute(text("UPDATE authority SET authority = 'postgres', epoch = 1"))
        (row,) = claims.look(connection, book, MOST_LOSSES)
        (taken,) = claims.take(connection, 1, "w", "w-life", ["job"], MOST_LOSSES, held={"job": row.held})
        assert taken.message.endswith('"delivery_tag":"job:1.1/2"}}')
        assert _stored(connection) == (f"{WIDE.shape},|2{TERM[1:]}", {"cpus": 4, "slots": 1})
        claims.give_back(connection, claims.open_attempts(connection, "w-life"), None, "gone", MOST_LOSSES)
        assert _stored(connection) == (waiting.shape, {"cpus": 1, "gpus": 1, "slots": 1})
        connection.execute(text("DELETE FROM attempts"))
        connection.execute(text("DELETE FROM jobs"))


def _stored(connection: object) -> tuple[str, dict[str, int]]:
    row = connection.execute(text("SELECT shape, request FROM jobs WHERE id = 'job'")).one()  # type: ignore[attr-defined]
    return row[0], row[1]
