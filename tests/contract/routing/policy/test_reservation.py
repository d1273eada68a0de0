"""The scripts keep to reservations as the policy does: the jobs that pass a reserved worker, and the room beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import (
    CANDIDATES,
    MAX_ADMITTED,
    Admission,
    Book,
    Refusal,
    Waiting,
    choose,
    fits,
    order,
)
from celery_capacity.routing.policy.reservation import Reservation, after_start, first_fitting, passes
from celery_capacity.routing.policy.tenants import Sharing, tenant_term
from tests.contract.routing.ledger.test_admission import (
    BOOKS,
    ON_A_SERVER,
    REQUESTS,
    WRITTEN,
    capacities,
    delivered,
    vectors,
    write,
)
from tests.contract.routing.policy.test_tenants import OTHERS, SHARINGS, TENANTS, alternatives, write_sharing
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, job_field, write_book
from tests.fixtures.stores.cluster import ONE, Cluster

#: Milliseconds from the writing of a reservation to its time. Far more than a test takes.
AHEAD: Final = 1_000_000
#: Expected run times: unknown, surely over by the reserved time, surely not.
EXPECTED: Final = st.sampled_from([0, *map(expected_class, (1024, 2**23))])
BACKLOG: Final = st.lists(
    st.tuples(REQUESTS, st.integers(0, 2), EXPECTED, st.sampled_from([0, 0, 0, 0, 1])), min_size=1, max_size=20
).map(
    lambda jobs: [
        Waiting(
            f"job-{seq:02}",
            Request.of({**dict(request.amounts), ALONE: 1}) if alone else request,
            order(rank, seq),
            run_time=RunTime(expected, expected),
        )
        for seq, (request, rank, expected, alone) in enumerate(jobs)
    ]
)


def file(ledger: Ledger, backlog: Sequence[Waiting]) -> None:
    for waiting in backlog:
        assert ledger.submit(waiting.job, waiting.shape, waiting.order, MESSAGE).state == "waiting"


def write_reservation(ledger: Ledger, reservation: Reservation) -> None:
    """Write a reservation as `reserve` does; the book is written already."""
    kept: dict[Any, Any] = {
        "kept": reservation.shape,
        "kept_at": reservation.at,
        "kept_since": reservation.since,
        "kept_order": reservation.order,
        "beside": ",".join(f"{name}={amount}" for name, amount in reservation.beside.items()),
    }
    ledger.client.hset(keys.book(reservation.worker), mapping=kept)
    ledger.client.hset(keys.KEYS["kept"], reservation.shape, reservation.worker)
    ledger.client.hset(keys.EPOCH, "reserved", reservation.worker)


def read_reservation(ledger: Ledger, worker: str) -> Reservation | None:
    return snapshot.read_books(ledger.client, [worker])[worker].reservation


def first_of_shapes(backlog: Sequence[Waiting]) -> list[Waiting]:
    """Return the first waiting job of each shape that need not be alone."""
    firsts: dict[str, Waiting] = {}
    for waiting in sorted(backlog, key=lambda waiting: (waiting.order, waiting.job)):
        firsts.setdefault(waiting.shape, waiting)
    return [waiting for waiting in firsts.values() if not waiting.request.get(ALONE)]


def left_by(reservation: Reservation, admitted: Sequence[Waiting], now: int) -> Reservation | None:
    """Return the reservation after these jobs started, by the policy."""
    left: Reservation | None = reservation
    for waiting in admitted:
        left = after_start(waiting, left, now)
    return left


def amounts(beside: Reservation | None) -> dict[str, int] | None:
    return None if beside is None else {name: amount for name, amount in beside.beside.items() if amount > 0}


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(900))
@given(
    BACKLOG,
    capacities(st.integers(1, 6)),
    vectors(st.integers(0, 3)),
    vectors(st.integers(0, 3)),
    st.booleans(),
    st.data(),
)
def test_pass_over_a_reserved_worker_admits_what_the_policy_says(
    ledger: Ledger,
    backlog: list[Waiting],
    capacity: dict[str, int],
    allocated: dict[str, int],
    beside: dict[str, int],
    timed: bool,
    data: st.DataObject,
) -> None:
    write(ledger, [])
    file(ledger, backlog)
    book = Book("w", capacity, allocated)
    able = [head for head in first_of_shapes(backlog) if fits(head.request, replace(book, allocated={})) is None]
    if not able:
        return
    head, now = data.draw(st.sampled_from(able)), ledger.now_ms()
    reservation = Reservation("w", head.shape, head.order, now + AHEAD if timed else 0, beside)
    write_book(ledger, replace(book, kept=head.shape))
    write_reservation(ledger, reservation)
    expected = fill_or_keep(book, backlog, MAX_ADMITTED, (), reservation, now).admitted
    reply = ledger._call("fill", worker="w", after="-inf")
    assert delivered(ledger.client, "queue.w") == [waiting.job for waiting in expected]
    assert reply.number("admitted") == len(expected)
    left = left_by(reservation, expected, now)
    stored = read_reservation(ledger, "w")
    assert amounts(stored) == amounts(left)
    final = book
    for waiting in expected:
        final = final.holding(waiting.request)
    # Only a worker that is reserved no more stands in the index.
    stands = ledger.client.zscore(keys.FREE, "w") is not None
    kept = snapshot.read_books(ledger.client, ["w"])["w"].kept
    assert stands == replace(final, kept=kept).open


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(1_300))
@given(BOOKS, REQUESTS, EXPECTED, REQUESTS, vectors(st.integers(0, 3)), st.booleans(), st.data())
def test_new_job_goes_where_the_policy_says_beside_a_reservation(
    ledger: Ledger,
    books: list[Book],
    head_request: Request,
    expected: int,
    request_: Request,
    beside: dict[str, int],
    earlier: bool,
    data: st.DataObject,
) -> None:
    write(ledger, [])
    head = Waiting("head", head_request, order(1, 5))
    file(ledger, [head])
    reserved = data.draw(st.sampled_from(books)).worker
    for book in books:
        write_book(ledger, replace(book, kept=head.shape if book.worker == reserved else ""), _status(book))
    now = ledger.now_ms()
    reservation = Reservation(reserved, head.shape, head.order, now + AHEAD, beside)
    write_reservation(ledger, reservation)
    job = Waiting("job", request_, order(2 if earlier else 0, 9), run_time=RunTime(expected, expected))
    if job.shape == head.shape:
        return
    decision: Admission | Refusal = choose(request_, [book for book in books if book.worker != reserved], CANDIDATES)
    worker = decision.worker if isinstance(decision, Admission) else None
    mine = next(book for book in books if book.worker == reserved)
    if worker is None and passes(job, reservation, now) and mine.open and fits(request_, mine) is None:
        # The head itself starts first where it fits.
        first = fill_or_keep(mine, [head, job], MAX_ADMITTED, (), reservation, now).admitted
        worker = reserved if job in first else None
    submitted = ledger.submit("job", job.shape, job.order, MESSAGE)
    assert submitted.worker in (worker, None)
    assert (job_field(ledger.client, "job", "worker") or b"").decode() == (worker or "")


@WRITTEN
@settings(ON_A_SERVER, max_examples=examples(400))
@given(
    BACKLOG,
    st.lists(st.tuples(st.sampled_from(TENANTS), OTHERS), min_size=20, max_size=20),
    SHARINGS,
    capacities(st.integers(1, 6)),
    vectors(st.integers(0, 3)),
    vectors(st.integers(0, 3)),
    st.booleans(),
    st.data(),
)
def test_pass_over_a_reserved_worker_keeps_the_turns_of_tenants(
    ledger: Ledger,
    backlog: list[Waiting],
    shared: list[tuple[str, list[dict[str, int]]]],
    sharing: Sharing,
    capacity: dict[str, int],
    allocated: dict[str, int],
    beside: dict[str, int],
    timed: bool,
    data: st.DataObject,
) -> None:
    write(ledger, [])
    backlog = [
        replace(job, terms=alternatives(job.request, others) + tenant_term(tenant))
        for job, (tenant, others) in zip(backlog, shared, strict=False)
        if not job.request.get(ALONE)
    ]
    file(ledger, backlog)
    book = Book("w", capacity, allocated)
    empty = replace(book, allocated={})
    able = [head for head in first_of_shapes(backlog) if first_fitting(head, empty, sharing=sharing) is not None]
    if able:
        write_sharing(ledger, sharing)
        head, now = data.draw(st.sampled_from(able)), ledger.now_ms()
        reservation = Reservation("w", head.shape, head.order, now + AHEAD if timed else 0, beside)
        write_book(ledger, replace(book, kept=head.shape))
        write_reservation(ledger, reservation)
        expected = fill_or_keep(book, backlog, MAX_ADMITTED, (), reservation, now, sharing).admitted
        ledger._call("fill", worker="w", after="-inf")
        assert delivered(ledger.client, "queue.w") == [waiting.job for waiting in expected]
    # The use at the beginning is nobody's.
    ledger.client.delete(keys.USED)
    write(ledger, [])


def _status(book: Book) -> str:
    return "ready" if book.admitting else "draining"


# -- a worker in use


WIDE: Final = Request.of({"cpus": 4000, "memory": 10}).shape
BESIDE: Final = {"cpus": 1000, "memory": 20, "slots": 3}


def reserve(cluster: Cluster, job: str = "wide", shape: str = WIDE, at: int = 0, worker: str = "w") -> Reservation:
    """Reserve a worker for a waiting job, with room for one other beside it."""
    head = int(job_field(cluster.client, job, "order") or 0)
    reservation = Reservation(worker, shape, head, at, BESIDE, since=0 if at else cluster.ledger.now_ms())
    allocated = snapshot.read_books(cluster.client, [worker])[worker].allocated
    assert cluster.ledger.reserve(reservation, allocated, [worker])
    return reservation


def test_reserved_worker_takes_others_only_beside_the_head(cluster: Cluster) -> None:
    token = cluster.run("one")
    assert cluster.submit("wide", WIDE) is None
    reserve(cluster)
    assert cluster.client.zscore(keys.FREE, "w") is None
    for job in ("beside", "waits"):
        cluster.submit(job)
    assert (cluster.state("beside"), cluster.state("waits")) == ("admitted", "waiting")
    cluster.claim("beside", token)
    cluster.end("beside", token)
    # Room beside the head that others have used is given back by the next look, and not before.
    assert cluster.state("waits") == "waiting"
    cluster.end("one", token)
    assert (cluster.state("wide"), read_reservation(cluster.ledger, "w")) == ("admitted", None)
    assert cluster.client.hlen(keys.KEYS["kept"]) == 0
    cluster.claim("wide", token)
    cluster.end("wide", token)
    assert cluster.state("waits") == "admitted"


def test_reservation_is_refused_where_the_books_have_changed(cluster: Cluster) -> None:
    token = cluster.run("one")
    cluster.submit("wide", WIDE)
    head = int(job_field(cluster.client, "wide", "order") or 0)
    allocated = snapshot.read_books(cluster.client, ["w"])["w"].allocated
    cluster.submit("two")
    assert not cluster.ledger.reserve(Reservation("w", WIDE, head, 0, {}), allocated, ["w"])
    allocated = snapshot.read_books(cluster.client, ["w"])["w"].allocated
    assert not cluster.ledger.reserve(Reservation("w", WIDE, head + 1, 0, {}), allocated, ["w"])
    assert not cluster.ledger.reserve(Reservation("w", ONE, head, 0, {}), allocated, ["w"])
    assert not cluster.ledger.reserve(Reservation("x", WIDE, head, 0, {}), allocated, ["w"])
    assert cluster.ledger.reserve(Reservation("w", WIDE, head, 0, {}), allocated, ["w"])
    for job in ("one", "two"):
        if job == "two":
            cluster.claim(job, token)
        cluster.end(job, token)
    assert cluster.state("wide") == "admitted"


def test_reservation_is_refused_for_a_pause_a_cordon_or_a_worker_that_ends(cluster: Cluster) -> None:
    cluster.run("one")
    shape = f"{WIDE},tasks.wide,~512000"
    cluster.submit("wide", shape)
    head = int(job_field(cluster.client, "wide", "order") or 0)
    allocated = snapshot.read_books(cluster.client, ["w"])["w"].allocated
    refused = Reservation("w", shape, head, 0, {})
    for version, control in enumerate((("pause", "task:tasks.wide"), ("pause", "platform"), ("cordon", "w")), start=1):
        cluster.ledger.set_controls(2 * version, {control: "1"}, last=True)
        assert not cluster.ledger.reserve(refused, allocated, ["w"])
        cluster.ledger.set_controls(2 * version + 1, {control: ""}, last=True)
    cluster.client.hset(keys.book("w"), "ends", cluster.ledger.now_ms() + 400_000)
    assert not cluster.ledger.reserve(refused, allocated, ["w"])
    cluster.client.hdel(keys.book("w"), "ends")
    assert cluster.ledger.reserve(refused, allocated, ["w"])


def test_release_on_a_worker_that_is_reserved_for_a_paused_job_frees_it(cluster: Cluster) -> None:
    token = cluster.run("one")
    shape = f"{WIDE},tasks.wide"
    cluster.submit("wide", shape)
    reserve(cluster, shape=shape)
    for job in ("beside", "waits", "waits-too"):
        cluster.submit(job)
    assert cluster.state("waits") == "waiting"
    cluster.ledger.set_controls(1, {("pause", "task:tasks.wide"): "1"}, last=True)
    assert cluster.submit("paused", shape) is None
    cluster.end("one", token)
    assert [cluster.state(job) for job in ("wide", "waits", "waits-too")] == ["waiting", "admitted", "admitted"]
    assert (read_reservation(cluster.ledger, "w"), cluster.client.hlen(keys.KEYS["kept"])) == (None, 0)


def test_cancel_of_the_reserved_job_fills_the_worker(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    reservation = reserve(cluster)
    for job in ("beside", "waits"):
        cluster.submit(job)
    assert reservation.kept
    cluster.ledger.cancel("wide", State.CANCELLED, "revoked")
    assert cluster.state("waits") == "admitted"
    assert read_reservation(cluster.ledger, "w") is None


def test_end_of_a_reservation_names_the_worker_to_be_filled(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    reserve(cluster)
    assert cluster.ledger.unreserve("", ["w"]) == ""
    assert cluster.client.hget(keys.EPOCH, "reserved") == b"w"
    assert cluster.ledger.unreserve(WIDE, []) == "w"
    assert cluster.ledger.unreserve(WIDE, []) == ""
    assert cluster.client.hget(keys.EPOCH, "reserved") is None
    assert cluster.submit("next") == "w"


def test_head_that_starts_elsewhere_frees_its_reserved_worker(cluster: Cluster) -> None:
    token = cluster.run("one")
    cluster.submit("wide", WIDE)
    reserve(cluster)
    for job in ("beside", "waits"):
        cluster.submit(job)
    cluster.register("x")
    assert job_field(cluster.client, "wide", "worker") == b"x"
    assert cluster.state("waits") == "admitted"
    assert read_reservation(cluster.ledger, "w") is None
    cluster.end("one", token)


def test_job_that_must_be_alone_is_kept_no_reserved_worker(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    reserve(cluster)
    cluster.submit("last", losses=2)
    cluster.renew("one")
    reservation = read_reservation(cluster.ledger, "w")
    assert reservation is not None
    assert reservation.shape == WIDE


@pytest.mark.parametrize("many", [3])
def test_bulk_of_jobs_takes_the_room_beside_the_head(cluster: Cluster, many: int) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    reserve(cluster)
    rows = [(f"bulk-{number}", ONE, order(0, 100 + number), MESSAGE, 0, 0, 0) for number in range(many)]
    assert cluster.ledger.submit_many(rows) == many
    states = [cluster.state(f"bulk-{number}") for number in range(many)]
    assert states == ["admitted", *["waiting"] * (many - 1)]
