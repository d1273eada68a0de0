"""The sweep asks only workers to be filled that have room for a waiting job."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.request import Request, filed_shape
from celery_capacity.routing.policy.placement import SHAPES, Book, fits, order
from celery_capacity.routing.recovery import workers_with_room
from tests.contract.routing.ledger.test_indexes import commands
from tests.fixtures.stores.books import MESSAGE, VIEW, job_field, write_book

FULL = {"cpus": 4000, "memory": 100, "slots": 4}


def waits(ledger: Ledger, **amounts: int) -> None:
    shape = Request.of(amounts).shape
    assert ledger.submit(shape, shape, order(0, 1), MESSAGE).state == "waiting"


def asked_workers(ledger: Ledger) -> list[str]:
    shapes: Any = ledger.client.zrange(keys.SHAPES, 0, -1)
    return list(workers_with_room.with_room(ledger.client, [shape.decode() for shape in shapes]))


@pytest.mark.leaves("I1", "I6", because="no job holds the room that is taken, and no script counted it")
def test_nobody_is_asked_where_no_worker_has_room(ledger: Ledger) -> None:
    for number in range(100):
        write_book(ledger, Book(f"w{number}", FULL, {"cpus": 1000, "memory": 90, "slots": 1}))
    for number in range(100):
        waits(ledger, cpus=1000, memory=11 + number)
    assert asked_workers(ledger) == []


@pytest.mark.leaves("I1", because="no job holds the room that is taken")
def test_only_the_worker_with_room_is_asked(ledger: Ledger) -> None:
    for number in range(100):
        write_book(ledger, Book(f"w{number}", FULL, {"cpus": 1000, "memory": 90, "slots": 1}))
    waits(ledger, cpus=1000, memory=11)
    waits(ledger, cpus=1000, memory=50)
    write_book(ledger, Book("roomy", FULL, {"cpus": 1000, "memory": 40, "slots": 1}))
    assert asked_workers(ledger) == ["roomy"]
    assert ledger.fill("roomy") == 1


@pytest.mark.leaves("I1", "I6", because="no job holds the room that is taken, and no script counted it")
def test_worker_that_may_be_kept_is_asked(ledger: Ledger) -> None:
    write_book(ledger, Book("w", FULL, {"cpus": 1000, "memory": 0, "slots": 1}))
    waits(ledger, cpus=1000, alone=1)
    waits(ledger, cpus=3500)
    assert asked_workers(ledger) == ["w"]


@pytest.mark.leaves("I1", "I6", because="no job holds the room, and a shape is unreadable")
def test_every_worker_is_asked_where_a_shape_is_unreadable(ledger: Ledger) -> None:
    write_book(ledger, Book("w", FULL, {"cpus": 1000, "memory": 100, "slots": 1}))
    ledger.client.zadd("ledger:shapes", {"no shape": 1})
    assert asked_workers(ledger) == ["w"]


def test_worker_is_asked_only_for_tasks_that_it_knows(ledger: Ledger) -> None:
    ledger.register("w", "life", "queue.w", Request.of(FULL).shape, VIEW, tasks=["tasks.old"])
    shape = filed_shape(Request.of({"cpus": 1000}).shape, "tasks.new")
    assert ledger.submit("job", shape, order(0, 1), MESSAGE).state == "waiting"
    assert asked_workers(ledger) == []
    ledger.register("x", "life", "queue.x", Request.of(FULL).shape, VIEW, tasks=["tasks.new"], admit=False)
    assert asked_workers(ledger) == ["x"]


@pytest.mark.leaves("I1", "I6", because="no job holds the room that is taken")
def test_sweep_fills_room_that_was_left_in_policy_order(ledger: Ledger) -> None:
    for name in "ab":
        write_book(ledger, Book(name, FULL, {"cpus": 4000, "slots": 1}))
    for n, cpus in enumerate((3000, 1000, 2000, 1000)):
        shape = Request.of({"cpus": cpus}).shape
        assert ledger.submit(f"job-{n}", shape, order(n % 2, n), MESSAGE).state == "waiting"
    for name, free in (("a", 2000), ("b", 4000)):
        write_book(ledger, Book(name, FULL, {"cpus": 4000 - free, "slots": 1}))
    assert workers_with_room.fill_all(ledger) == 3
    workers = [job_field(ledger.client, f"job-{n}", "worker") for n in range(4)]
    assert workers == [b"b", b"a", None, b"a"]
    assert workers_with_room.fill_all(ledger) == 0


@pytest.mark.leaves("I1", "I6", because="no job holds the room that is taken, and an index is lost")
@pytest.mark.parametrize("lost", [keys.asks("cpus"), keys.shapes_of("queue:celery")])
def test_sweep_fills_room_for_shapes_that_an_index_lost(ledger: Ledger, lost: str) -> None:
    write_book(ledger, Book("a", FULL, {"cpus": 4000, "slots": 1}))
    # More shapes than the first page of a pass, and the only one that fits is the last.
    rows = [(f"job-{n}", Request.of({"cpus": 1000 + SHAPES - n}).shape, n, MESSAGE, 0, 0, 0) for n in range(SHAPES + 1)]
    assert ledger.submit_many(rows) == SHAPES + 1
    ledger.client.delete(lost)
    write_book(ledger, Book("a", FULL, {"cpus": 3000, "slots": 1}))
    assert workers_with_room.fill_all(ledger) == 1


@pytest.mark.leaves("I1", "I6", because="no job holds the room that is taken, and no script counted it")
def test_sweep_in_vain_costs_the_same_at_any_number_of_workers(ledger: Ledger) -> None:
    costs = []
    for workers in (9, 900):
        ledger.client.flushdb()
        ledger.open_epoch(1)
        ledger.finish_epoch(1)
        for n in range(workers):
            write_book(ledger, Book(f"w{n}", FULL, {"cpus": 1000, "memory": 90, "slots": 1}))
        # Each asks for less of one than the others, and none fits.
        shapes = [Request.of({"cpus": 1 + n, "memory": 500 - n}).shape for n in range(300)]
        rows = [(f"job-{n}", shape, n, MESSAGE, 0, 0, 0) for n, shape in enumerate(shapes)]
        assert ledger.submit_many(rows) == 300
        costs.append(commands(ledger, lambda: workers_with_room.fill_all(ledger)))
    assert costs[0] == costs[1]


AMOUNTS = st.integers(1, 4)
REQUESTS = st.lists(
    st.builds(
        lambda cpus, memory, gpus: Request.of({"cpus": cpus, "memory": memory, **({"gpus": gpus} if gpus else {})}),
        AMOUNTS,
        AMOUNTS,
        st.integers(0, 2),
    ),
    min_size=1,
)


@given(REQUESTS, st.integers(0, 4), st.integers(0, 4), st.integers(0, 2))
def test_smallest_requests_decide_like_all_requests(requests: list[Request], cpus: int, memory: int, gpus: int) -> None:
    book = Book("w", {"cpus": cpus, "memory": memory, "gpus": gpus, "slots": 1}, {})
    wanted = workers_with_room.smallest(request.shape for request in requests)
    assert wanted is not None
    assert workers_with_room.may_take(book, wanted) == any(fits(request, book) is None for request in requests)
