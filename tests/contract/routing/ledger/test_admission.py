"""The scripts choose as the policy does: the worker that a submit takes, and the jobs that room lets in.

Room comes from a release or a registration.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Ended, Filled
from celery_capacity.routing.ledger.scripts import MAX_BATCH
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.envelope import digest_of
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import (
    CANDIDATES,
    MAX_ADMITTED,
    SHAPES,
    Admission,
    Book,
    Refusal,
    Waiting,
    choose,
    order,
)
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW, job_field, write_book

#: Each example takes some milliseconds of the server.
ON_A_SERVER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

#: Few amounts, so that workers tie, requests equal what is free, and a request of nothing comes about.
AMOUNTS: Final = {"cpus": (0, 500, 1000, 1500, 2000, 4000), "memory": (0, 1, 2, 3), "licence": (0, 1, 2)}
VECTORS: Final = st.fixed_dictionaries({name: st.sampled_from(amounts) for name, amounts in AMOUNTS.items()})
#: Most jobs are in the default queue, and most workers serve it.
JOB_QUEUES: Final = st.sampled_from([DEFAULT_QUEUE, DEFAULT_QUEUE, "Vidéo/hd", "mail"])
REQUESTS: Final = st.builds(lambda amounts, queue: Request.of(amounts).within(queue), VECTORS, JOB_QUEUES)
SERVED: Final = st.sampled_from([(DEFAULT_QUEUE,), (DEFAULT_QUEUE, "mail"), ("mail",), ("Vidéo/hd", "mail"), ()])


def vectors(slots: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, int]]:
    amounts = {name: st.sampled_from(amounts) for name, amounts in AMOUNTS.items()}
    return st.fixed_dictionaries({"slots": slots}, optional=amounts)


def capacities(slots: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, int]]:
    return st.builds(lambda amounts, queues: {**amounts, **labels(queues)}, vectors(slots), SERVED)


#: Names whose order by number differs from their order by text.
NAMES: Final = st.integers(1, 40).map(lambda number: f"w{number}")
#: Allocations in a queue that the worker may not serve any more.
HELD: Final = st.sampled_from([{}, {}, {"queue:mail": 1}])
#: Books with room, full books, and books over their capacity, even in a resource that they do not publish.
BOOKS: Final = st.lists(
    st.builds(
        lambda name, capacity, allocated, held, admitting: Book(name, capacity, {**allocated, **held}, admitting),
        *(NAMES, capacities(st.integers(1, 3)), vectors(st.integers(0, 3)), HELD, st.booleans()),
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda book: book.worker,
)
#: Reasons why a worker does not admit.
CLOSED: Final = st.sampled_from(["draining", "closed", "expired", "older epoch"])


#: Books with allocations that no job holds.
WRITTEN: Final = pytest.mark.leaves(
    "I1", "I6", because="books are written with allocations that no job holds", sometimes=True
)


def write(ledger: Ledger, books: Sequence[Book], why: str = "draining") -> None:
    """Write the books as the scripts would have left them."""
    ledger.client.flushdb()
    ledger.open_epoch(1)
    ledger.finish_epoch(1)
    for book in books:
        write_book(ledger, book, "ready" if book.admitting else why)


def asked(decision: Admission | Refusal) -> str | None:
    return decision.worker if isinstance(decision, Admission) else None


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(300))
@given(BOOKS, REQUESTS, CLOSED)
def test_submit_admits_to_the_worker_that_the_policy_chooses(
    ledger: Ledger, books: list[Book], request_: Request, why: str
) -> None:
    write(ledger, books, why)
    expected = choose(request_, books, CANDIDATES)
    submitted = ledger.submit("job", request_.shape, order(0, 1), MESSAGE)
    if isinstance(expected, Admission):
        assert (submitted.state, submitted.worker, submitted.attempt) == ("admitted", expected.worker, 1)
    else:
        assert submitted.state == "waiting"
        assert ledger.client.zrange(keys.wait(request_.shape), 0, -1) == [b"job"]
        assert ledger.client.zscore(keys.SHAPES, request_.shape) == order(0, 1)


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(300))
@given(BOOKS, st.lists(REQUESTS, min_size=2, max_size=12))
def test_submits_take_what_the_policy_takes_one_after_another(
    ledger: Ledger, books: list[Book], requests: list[Request]
) -> None:
    write(ledger, books)
    waiting: set[str] = set()
    for seq, request_ in enumerate(requests):
        decision: Admission | Refusal = choose(request_, books, CANDIDATES)
        if request_.shape in waiting:
            assert isinstance(decision, Refusal), "what waits has no room"
        submitted = ledger.submit(f"job-{seq}", request_.shape, order(0, seq), MESSAGE)
        assert submitted.worker == asked(decision)
        if isinstance(decision, Admission):
            books = [book.holding(request_) if book.worker == decision.worker else book for book in books]
        else:
            waiting.add(request_.shape)


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(300))
@given(BOOKS, st.lists(REQUESTS, min_size=2, max_size=12))
def test_submit_many_takes_what_the_policy_takes_one_after_another(
    ledger: Ledger, books: list[Book], requests: list[Request]
) -> None:
    write(ledger, books)
    rows, expected = [], []
    for seq, request_ in enumerate(requests):
        decision: Admission | Refusal = choose(request_, books, CANDIDATES)
        if isinstance(decision, Admission):
            books = [book.holding(request_) if book.worker == decision.worker else book for book in books]
        rows.append((f"job-{seq}", request_.shape, order(0, seq), MESSAGE, 0, 0, 0))
        expected.append(asked(decision))
    assert ledger.submit_many(rows) == len(rows)
    jobs = snapshot.read_jobs(ledger.client, [row[0] for row in rows]).values()
    assert [job.get("worker") for job in jobs] == expected
    assert [job["state"] for job in jobs] == ["admitted" if worker else "waiting" for worker in expected]
    assert {job["digest"] for job in jobs} == {digest_of(MESSAGE)}
    # Again: the ledger knows all of them.
    assert ledger.submit_many(rows) == 0


#: Jobs of one request, in a row: a single job, some, or more than most workers have slots.
RUNS: Final = st.lists(st.tuples(REQUESTS, st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=5)


def standing(ledger: Ledger) -> dict[bytes, Any]:
    """Return all that the ledger holds except the stream and the times of its entries."""
    client: Any = ledger.client
    contents: dict[bytes, Any] = {}
    for key in sorted(client.scan_iter()):
        kind = client.type(key)
        if kind == b"hash":
            fields = client.hgetall(key)
            times = (b"lease", b"entry", b"admitted", b"opened") if key != keys.COUNTERS.encode() else ()
            contents[key] = {name: value for name, value in fields.items() if name not in times}
        elif kind == b"zset":
            timed = key.decode() in (keys.LEASES, keys.UNCLAIMED)
            contents[key] = client.zrange(key, 0, -1, withscores=not timed)
            contents[key] = sorted(contents[key]) if timed else contents[key]
        elif kind == b"list":
            contents[key] = client.lrange(key, 0, -1)
        elif key.decode().startswith(keys.KEYS["job"]):
            job = snapshot.parse_job(client.get(key))
            contents[key] = {name: value for name, value in job.items() if name not in ("entry", "admitted")}
        elif kind == b"string":
            contents[key] = client.get(key)
    return contents


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(300))
@given(BOOKS, RUNS)
def test_many_submitted_at_once_leave_the_ledger_as_one_after_another_do(
    ledger: Ledger, books: list[Book], runs: list[tuple[Request, int, int]]
) -> None:
    rows: list[Any] = []
    for request_, rank, times in runs:
        for _ in range(times):
            rows.append((f"job-{len(rows)}", request_.shape, order(rank, len(rows)), MESSAGE, 0, 0, 0))
    write(ledger, books)
    for row in rows:
        ledger.submit_one(row)
    expected = standing(ledger)
    write(ledger, books)
    # A job that is named twice is known the second time.
    assert ledger.submit_many([*rows, rows[-1]]) == len(rows)
    assert standing(ledger) == expected


def test_a_run_that_is_longer_than_a_command_may_be_goes_on_by_another(ledger: Ledger) -> None:
    many = 2 * MAX_BATCH + 1
    write(ledger, [Book("w1", {"cpus": 1000 * many, "memory": 9, "slots": many}, {})])
    shape, more = Request.of({"cpus": 1000}).shape, 10
    rows = [(f"job-{n}", shape, order(0, n), MESSAGE, 0, 0, 0) for n in range(many + more)]
    assert ledger.submit_many(rows) == many + more
    client: Any = ledger.client
    assert client.llen("queue.w1") == client.hlen(keys.held("w1")) == client.zcard(keys.UNCLAIMED) == many
    assert client.hmget(keys.book("w1"), "a.cpus", "a.slots") == [str(1000 * many).encode(), str(many).encode()]
    assert client.zrange(keys.wait(shape), 0, -1) == [row[0].encode() for row in rows[many:]]
    assert client.hmget(keys.COUNTERS, "admitted", "filed") == [str(many).encode(), str(more).encode()]


BACKLOG: Final = st.lists(st.tuples(REQUESTS, st.integers(0, 9)), max_size=40).map(
    lambda jobs: [Waiting(f"job-{seq}", request, order(rank, seq)) for seq, (request, rank) in enumerate(jobs)]
)


def file(ledger: Ledger, backlog: Sequence[Waiting]) -> None:
    for waiting in backlog:
        submitted = ledger.submit(waiting.job, waiting.request.shape, waiting.order, MESSAGE)
        assert submitted.state == "waiting"


def delivered(client: Any, queue: str) -> list[str]:
    """Return the jobs whose messages were pushed, in the order of the pushes."""
    tags = [message.rpartition(b'"delivery_tag":"')[2] for message in reversed(client.lrange(queue, 0, -1))]
    return [tag.partition(b":")[0].decode() for tag in tags]


def passes(book: Book, backlog: Sequence[Waiting]) -> list[str]:
    """Return the jobs that the policy admits in passes of a single script each.

    The passes end when a pass admits fewer than the most.
    """
    admitted: list[Waiting] = []
    while True:
        remaining = [candidate for candidate in backlog if candidate not in admitted]
        pass_ = fill_or_keep(book, remaining, MAX_ADMITTED).admitted
        for waiting in pass_:
            book = book.holding(waiting.request)
        admitted += pass_
        if len(pass_) < MAX_ADMITTED:
            return [waiting.job for waiting in admitted]


@settings(ON_A_SERVER, max_examples=examples(300))
@given(BACKLOG, capacities(st.integers(1, 50)))
def test_a_registration_admits_what_the_policy_fills_in_with_in_its_order(
    ledger: Ledger, backlog: list[Waiting], capacity: dict[str, int]
) -> None:
    write(ledger, [])
    file(ledger, backlog)
    expected = passes(Book("w", capacity, {}), backlog)
    registered = ledger.register("w", "life", "queue", Capacity.of(capacity).shape, VIEW)
    assert registered == Filled(len(expected))
    assert delivered(ledger.client, "queue") == expected


@settings(ON_A_SERVER, max_examples=examples(300))
@given(BACKLOG, vectors(st.integers(1, 50)), vectors(st.just(1)), SERVED)
def test_a_release_admits_what_the_policy_fills_in_with_in_its_order(
    ledger: Ledger, backlog: list[Waiting], capacity: dict[str, int], held: dict[str, int], queues: tuple[str, ...]
) -> None:
    write(ledger, [])
    ledger.register("w", "life", "queue", Request.of({**capacity, **held}).shape, VIEW)
    # The running job takes the whole worker, so that the backlog waits until it is released.
    whole = Request.of({**capacity, **held})
    assert ledger.submit("first", whole.shape, order(9, 0), MESSAGE).worker == "w"
    # From now on it serves these queues. The job that it holds belongs to none of the queues that it has left.
    ledger.register("w", "life", "queue", Capacity(whole.amounts).serving(queues).shape, VIEW)
    file(ledger, backlog)
    ledger.client.delete("queue")
    expected = passes(Book("w", {**capacity, **held, **labels(queues)}, {}), backlog)
    ended = [Ended("first", Token(1, 1), Outcome.SUCCEEDED)]
    assert ledger.settle("w", "life", ended=ended, most_losses=MOST_LOSSES).released[0].verdict == "released"
    assert delivered(ledger.client, "queue") == expected


@settings(ON_A_SERVER, max_examples=examples(300))
@given(BACKLOG, vectors(st.integers(1, 50)))
def test_reply_hands_over_the_jobs_that_a_queue_would_get(
    ledger: Ledger, backlog: list[Waiting], capacity: dict[str, int]
) -> None:
    write(ledger, [])
    whole = Request.of(capacity)
    ledger.register("w", "life", "queue", whole.shape, VIEW)
    ledger.submit("first", whole.shape, order(9, 0), MESSAGE)
    file(ledger, backlog)
    ledger.client.delete("queue")
    expected = fill_or_keep(Book("w", capacity, {}), backlog, MAX_ADMITTED).admitted
    ended = [Ended("first", Token(1, 1), Outcome.SUCCEEDED)]
    settled = ledger.settle("w", "life", ended=ended, most_losses=MOST_LOSSES, nonce="n")
    assert [handed.job for handed in settled.handed_over] == [waiting.job for waiting in expected]
    for handed in settled.handed_over:
        assert handed.message.endswith(f',"delivery_tag":"{handed.job}:1.1"}}}}')
        assert (handed.token, handed.shape) == (Token(1, 1), Request.of(dict(_amounts(handed.shape))).shape)
    assert delivered(ledger.client, "queue") == passes(Book("w", capacity, {}), backlog)[len(expected) :]


def _amounts(shape: str) -> Iterator[tuple[str, int]]:
    return iter(Request.from_shape(shape).amounts)


@settings(ON_A_SERVER, max_examples=examples(30))
@given(st.integers(0, 5), st.sampled_from([MAX_ADMITTED - 1, MAX_ADMITTED, 2 * MAX_ADMITTED + 3]))
def test_registration_goes_through_more_shapes_than_one_script_looks_at(ledger: Ledger, most: int, jobs: int) -> None:
    write(ledger, [])
    # As many shapes that never fit stand before the shapes that do: the cursor has to pass them.
    wide = [Waiting(f"wide-{n}", Request.of({"cpus": 9_000_000 + n}), order(9, n)) for n in range(SHAPES + most)]
    slim = [Waiting(f"slim-{n}", Request.of({"cpus": 1 + n % 3}), order(0, 1000 + n)) for n in range(jobs)]
    file(ledger, [*wide, *slim])
    ledger.register("w", "life", "queue", Request.of({"cpus": 1000, "slots": 1000}).shape, VIEW)
    assert delivered(ledger.client, "queue") == [waiting.job for waiting in slim]


def test_one_script_admits_as_many_as_the_policy_and_says_where_to_go_on(ledger: Ledger) -> None:
    jobs = [Waiting(f"job-{n}", Request.of({"cpus": 1}), order(0, n)) for n in range(MAX_ADMITTED + 5)]
    book = Book("w", {"cpus": 1000, "slots": 1000}, {})
    file(ledger, jobs)
    write_book(ledger, book)
    first = ledger._call("fill", worker="w", after="-inf")
    assert first.number("admitted") == len(fill_or_keep(book, jobs, MAX_ADMITTED).admitted)
    assert first["cursor"] == "-inf"
    assert ledger._call("fill", worker="w", after=first["cursor"])["admitted"] == "5"


# More workers than a single script looks at.


def crowd(free: Mapping[str, int]) -> list[Book]:
    """Return workers of one queue with so many free CPUs, of which only the last publishes memory."""
    serving = {"slots": 5, **labels([DEFAULT_QUEUE, "mail"])}
    books = [Book(name, {"cpus": cpus, **serving}, {}) for name, cpus in free.items()]
    return [*books[:-1], replace(books[-1], capacity={**books[-1].capacity, "memory": 1})]


@pytest.mark.parametrize("workers", [CANDIDATES, CANDIDATES + 1, 2 * CANDIDATES, 3 * CANDIDATES + 1])
@pytest.mark.parametrize("equal", [True, False], ids=["equal free CPUs", "other free CPUs each"])
def test_the_search_goes_on_by_the_cursor_until_a_worker_is_found(ledger: Ledger, workers: int, equal: bool) -> None:
    books = crowd({f"w{n:04}": 4000 if equal else 4000 + n for n in range(workers)})
    write(ledger, books)
    request_ = Request.of({"cpus": 1000, "memory": 1}).within("mail")
    assert choose(request_, books, len(books)) == Admission(books[-1].worker)
    submitted = ledger.submit("job", request_.shape, order(0, 1), MESSAGE)
    assert (submitted.state, submitted.worker, submitted.attempt) == ("admitted", books[-1].worker, 1)
    assert ledger.client.zcard(keys.SHAPES) == 0


def test_many_submitted_at_once_search_on_by_the_cursor_too(ledger: Ledger) -> None:
    *books, last = crowd({f"w{n:04}": 4000 for n in range(2 * CANDIDATES)})
    last = replace(last, capacity={**last.capacity, "memory": 2})
    write(ledger, [*books, last])
    shape = Request.of({"cpus": 1000, "memory": 1}).within("mail").shape
    assert ledger.submit_many([(f"job-{n}", shape, order(0, n), MESSAGE, 0, 0, 0) for n in range(3)]) == 3
    took = last.worker.encode()
    assert [job_field(ledger.client, f"job-{n}", "worker") for n in range(3)] == [took, took, None]


def test_of_many_that_come_too_late_none_is_taken(ledger: Ledger) -> None:
    late = time.time() * 1000 - ledger.submit_limit_ms - 1000
    rows = [(f"job-{n}", Request.of({}).shape, n, MESSAGE, 0, 0, 0, late + 1e6 * n) for n in range(2)]
    assert ledger.submit_many(rows) == 0
    assert ledger.client.exists(keys.job("job-0"), keys.job("job-1")) == 0


def test_the_cursor_of_a_submit_is_the_one_that_the_policy_says(ledger: Ledger) -> None:
    books = crowd({f"w{n:04}": 4000 + n for n in range(CANDIDATES + 5)})
    write(ledger, books)
    request_ = Request.of({"cpus": 1000, "memory": 1}).within("mail")
    refusal = choose(request_, books, CANDIDATES)
    values = ledger._submit_values("job", request_.shape, order(0, 1), MESSAGE, 0, 0, 0)
    reply = ledger._call("submit", **values)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, reply.head) == (Reason.LOOK_FURTHER, "waiting")
    assert (reply["cursor_score"], reply["cursor_worker"]) == (str(refusal.free), refusal.worker)


@pytest.mark.leaves("I6", because="the index is moved without its book")
def test_a_search_whose_cursor_moved_meanwhile_still_finds_the_worker(ledger: Ledger) -> None:
    books = crowd({f"w{n:04}": 4000 for n in range(3 * CANDIDATES)})
    write(ledger, books)
    request_ = Request.of({"cpus": 1000, "memory": 1}).within("mail")
    reply = ledger._call("submit", **ledger._submit_values("job", request_.shape, order(0, 1), MESSAGE, 0, 0, 0))
    assert reply.head == "waiting"
    # The worker at the cursor gets an allocation: it leaves its place.
    ledger.client.zadd(keys.free_of("queue:mail"), {reply["cursor_worker"]: 3000})
    placed = ledger.place_shape(request_.shape, reply["cursor_score"], reply["cursor_worker"])
    assert [admission.worker for admission in placed] == [books[-1].worker]


def test_a_job_that_fits_nowhere_is_filed_after_all_workers_were_looked_at(ledger: Ledger) -> None:
    books = crowd({f"w{n:04}": 4000 for n in range(3 * CANDIDATES)})
    write(ledger, books)
    request_ = Request.of({"cpus": 1000, "memory": 2}).within("mail")
    assert ledger.submit("job", request_.shape, order(0, 1), MESSAGE).state == "waiting"
    assert ledger.client.zrange(keys.wait(request_.shape), 0, -1) == [b"job"]


def test_job_behind_others_of_its_shape_is_not_searched_for_at_submit(ledger: Ledger) -> None:
    books = crowd({f"w{n:04}": 4000 for n in range(CANDIDATES + 1)})
    write(ledger, books)
    request_ = Request.of({"cpus": 1000, "memory": 1}).within("mail")
    first = ledger._call("submit", **ledger._submit_values("first", request_.shape, order(0, 1), MESSAGE, 0, 0, 0))
    assert first.head == "waiting"
    # The caller of the first job died here. The next job is filed unseen, and the sweep's fill finds both.
    assert ledger.submit("second", request_.shape, order(0, 2), MESSAGE).state == "waiting"
    assert ledger.fill(books[-1].worker) == 1
    assert delivered(ledger.client, f"queue.{books[-1].worker}") == ["first"]
