"""A new job passes the reserved worker that it fits best, as the simulation of the policy places it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.policy.labels import Place
from celery_capacity.routing.policy.placement import CANDIDATES, Admission, Book, Waiting, choose, order
from celery_capacity.routing.policy.reservation import Reservation, passes
from tests.contract.routing.ledger.test_admission import ON_A_SERVER, WRITTEN, write
from tests.contract.routing.policy.test_reservation import AHEAD, write_reservation
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, job_field, write_book

#: CPUs of each worker. Its head asks for all of them, so it fits nowhere while a job runs.
ALL: Final = 10
WORKERS: Final = st.lists(st.tuples(st.integers(1, ALL - 1), st.integers(0, ALL)), min_size=2, max_size=5)
#: CPUs of a job's alternatives, in its order.
ALTERNATIVES: Final = st.lists(st.integers(1, 6), min_size=1, max_size=2, unique=True)


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(300))
@given(WORKERS, ALTERNATIVES, st.booleans())
def test_new_job_passes_the_reserved_worker_that_it_fits_best(
    ledger: Ledger, workers: list[tuple[int, int]], cpus: list[int], spread: bool
) -> None:
    write(ledger, [])
    books, reservations = [], {}
    for number, (allocated, beside) in enumerate(workers):
        head = Waiting(f"head-{number}", Request.of({"cpus": ALL, "memory": number}), order(1, number))
        assert ledger.submit(head.job, head.shape, head.order, MESSAGE).state == "waiting"
        capacity = {"cpus": ALL, "slots": 20, "memory": 100}
        book = Book(f"w{number}", capacity, {"cpus": allocated, "slots": 1})
        at = ledger.now_ms() + AHEAD
        reservation = Reservation(book.worker, head.shape, head.order, at, {"cpus": beside, "slots": 9, "memory": 9})
        write_book(ledger, replace(book, kept=head.shape))
        write_reservation(ledger, reservation)
        books.append(book)
        reservations[book.worker] = reservation
    ledger.client.hset(keys.EPOCH, "reserved", " ".join(sorted(reservations)))
    requests = [Request.of({"cpus": amount}) for amount in cpus]
    job = Waiting("job", requests[0], order(0, 99), terms=alternatives_term(requests) + Place(spread=spread).terms)
    worker = ""
    for starting in job.alternatives:
        taking = replace(job, request=starting)
        passable = [book for book in books if passes(taking, reservations[book.worker], ledger.now_ms())]
        decision = choose(starting, passable, CANDIDATES, terms=job.terms)
        if isinstance(decision, Admission):
            worker = decision.worker
            break
    ledger.submit(job.job, job.shape, job.order, MESSAGE)
    assert (job_field(ledger.client, job.job, "worker") or b"").decode() == worker
