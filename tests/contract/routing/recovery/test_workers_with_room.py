"""The sweep asks only workers to be filled that have room for a waiting job."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book, fits, order
from celery_capacity.routing.recovery import workers_with_room
from tests.fixtures.books import MESSAGE, write_book

FULL = {"cpus": 4000, "memory": 100, "slots": 4}


def waits(ledger: Ledger, **amounts: int) -> None:
    shape = Request.of(amounts).shape
    assert ledger.submit(shape, shape, order(0, 1), MESSAGE).state == "waiting"


@pytest.mark.leaves("I1", "I6", because="no job holds the room that is taken, and no script counted it")
def test_nobody_is_asked_where_no_worker_has_room(ledger: Ledger) -> None:
    for number in range(100):
        write_book(ledger, Book(f"w{number}", FULL, {"cpus": 1000, "memory": 90, "slots": 1}))
    for number in range(100):
        waits(ledger, cpus=1000, memory=11 + number)
    assert list(workers_with_room.with_room(ledger.client)) == []


@pytest.mark.leaves("I1", because="no job holds the room that is taken")
def test_only_the_worker_with_room_is_asked(ledger: Ledger) -> None:
    for number in range(100):
        write_book(ledger, Book(f"w{number}", FULL, {"cpus": 1000, "memory": 90, "slots": 1}))
    waits(ledger, cpus=1000, memory=11)
    waits(ledger, cpus=1000, memory=50)
    write_book(ledger, Book("roomy", FULL, {"cpus": 1000, "memory": 40, "slots": 1}))
    assert list(workers_with_room.with_room(ledger.client)) == ["roomy"]
    assert ledger.fill("roomy") == 1


@pytest.mark.leaves("I1", "I6", because="no job holds the room that is taken, and no script counted it")
def test_worker_that_may_be_kept_is_asked(ledger: Ledger) -> None:
    write_book(ledger, Book("w", FULL, {"cpus": 1000, "memory": 0, "slots": 1}))
    waits(ledger, cpus=1000, alone=1)
    waits(ledger, cpus=3500)
    assert list(workers_with_room.with_room(ledger.client)) == ["w"]


@pytest.mark.leaves("I1", "I6", because="no job holds the room, and a shape is unreadable")
def test_every_worker_is_asked_where_a_shape_is_unreadable(ledger: Ledger) -> None:
    write_book(ledger, Book("w", FULL, {"cpus": 1000, "memory": 100, "slots": 1}))
    ledger.client.zadd("ledger:shapes", {"no shape": 1})
    assert list(workers_with_room.with_room(ledger.client)) == ["w"]


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
def test_smallest_requests_say_what_all_say(requests: list[Request], cpus: int, memory: int, gpus: int) -> None:
    book = Book("w", {"cpus": cpus, "memory": memory, "gpus": gpus, "slots": 1}, {})
    wanted = workers_with_room.smallest(request.shape for request in requests)
    assert wanted is not None
    assert workers_with_room.may_take(book, wanted) == any(fits(request, book) is None for request in requests)
