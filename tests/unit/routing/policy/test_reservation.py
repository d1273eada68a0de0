"""Reservations: where and when a blocked job can start, who passes it, and when a worker is kept for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import CANDIDATES, Book, Waiting, fits, order, shortages
from celery_capacity.routing.policy.reservation import (
    WORTH,
    Held,
    Patience,
    Reservation,
    Rules,
    after_start,
    earliest_start,
    expected_end,
    keep,
    kept_further,
    large_enough,
    passes,
    renew,
    reserve,
    room_beside,
)


def need(cpus: int, **more: int) -> Request:
    return Request.of({"cpus": cpus, **more})


def running(worker: str, cpus: int, *held: Held, admitting: bool = True, kept: str = "") -> tuple[Book, list[Held]]:
    book = Book(worker, {"cpus": cpus, "slots": 100}, {}, admitting, kept)
    for entry in held:
        book = book.holding(entry.request)
    return book, list(held)


def cluster(*workers: tuple[Book, list[Held]]) -> tuple[list[Book], Mapping[str, list[Held]]]:
    return [book for book, _ in workers], {book.worker: held for book, held in workers}


def waits(job: str, cpus: int, seq: int, expected: int = 0, priority: int = 0) -> Waiting:
    return Waiting(job, need(cpus), order(priority, seq), run_time=RunTime(expected, expected))


HEAD = waits("head", 8, 5)


def reserved(cpus_beside: int = 0, at: int = 100) -> Reservation:
    return Reservation("w", HEAD.shape, HEAD.order, at, {"cpus": cpus_beside, "slots": 90})


# -- when there is room


def test_expected_end_is_unknown_without_an_expectation() -> None:
    assert expected_end(Held(need(1), 5), 50) == 0
    assert expected_end(Held(need(1), 5, 100), 50) == 105


def test_expected_end_moves_by_a_growing_pause_after_an_overrun() -> None:
    late = Held(need(1), 0, 80)
    assert [expected_end(late, now) for now in (80, 85, 90, 100, 400)] == [90, 95, 100, 120, 720]


def test_earliest_start_is_when_enough_has_ended() -> None:
    book, held = running("w", 8, Held(need(4), 0, 30), Held(need(2), 0, 20), Held(need(2), 0))
    assert earliest_start(need(2), book, held, 10) == 20
    assert earliest_start(need(3), book, held, 10) == 30
    # A job with an unknown end is taken to stay.
    assert earliest_start(need(7), book, held, 10) == 0
    assert earliest_start(need(1), running("w", 8)[0], [], 10) == 10


def test_room_beside_leaves_what_neither_head_nor_staying_jobs_take() -> None:
    book, _ = running("w", 8, Held(need(2), 0))
    assert room_beside(need(5), book, [need(2)]) == {"cpus": 1, "slots": 98}
    assert room_beside(need(5), book, []) == {"cpus": 3, "slots": 99}
    assert room_beside(need(5, alone=1), book, []) == {}


# -- where


def test_reservation_is_on_the_worker_where_the_head_starts_soonest() -> None:
    books, held = cluster(running("a", 8, Held(need(8), 0, 90)), running("b", 9, Held(need(3), 0, 40)))
    assert reserve(HEAD, books, held, 10) == Reservation("b", HEAD.shape, HEAD.order, 40, {"cpus": 1, "slots": 99})
    # A later head reserves another worker.
    other = reserve(HEAD, books, held, 10, {"b"})
    assert other is not None
    assert (other.worker, other.at) == ("a", 90)


def test_reservation_is_on_no_worker_that_is_too_small_closed_or_kept() -> None:
    books, held = cluster(
        running("small", 7, Held(need(7), 0, 20)),
        running("closed", 9, Held(need(9), 0, 20), admitting=False),
        running("kept", 9, Held(need(9), 0, 20), kept="cpus=9,slots=1"),
        running("unknown", 9, Held(need(9), 0)),
    )
    assert reserve(HEAD, books, held, 10) is None


def test_reservation_is_on_a_worker_only_if_the_head_ends_there() -> None:
    head = replace(HEAD, run_time=RunTime(expected=20, bound=60))
    book, held = running("w", 9, Held(need(9), 0, 40))
    # It could start at 40, and has ended at 100: 90 from now.
    assert reserve(head, [replace(book, left=89)], {"w": held}, 10) is None
    made = reserve(head, [replace(book, left=90)], {"w": held}, 10)
    assert made is not None
    assert made.at == 40
    # Where a worker is kept, no start is known.
    assert keep(head, [replace(book, left=60)], {"w": held}, 10, 0) is not None
    assert keep(head, [replace(book, left=59)], {"w": held}, 10, 0) is None
    assert kept_further(replace(made, at=0), head, [replace(book, left=59)], {"w": held}) is None


def test_reserved_worker_lacks_what_it_lacks_and_is_left_to_nobody() -> None:
    book = Book("w", {"cpus": 8, "slots": 9}, {"cpus": 6}, kept=HEAD.shape, reserved_at=0)
    assert shortages(need(1), book) == []
    assert shortages(need(3), book) == [("cpus", 3, 2)]


def test_candidates_are_those_with_the_most_free_cpus() -> None:
    books = [running(f"w{number:03}", 8 + number)[0] for number in range(CANDIDATES + 3)]
    able = large_enough(HEAD, books)
    assert len(able) == CANDIDATES
    assert {book.worker for book in books} - {book.worker for book in able} == {"w000", "w001", "w002"}


def test_worker_is_kept_where_a_time_is_known_else_where_least_is_missing() -> None:
    books, held = cluster(running("a", 8, Held(need(8), 0, 90)), running("b", 9, Held(need(5), 0)))
    kept = keep(HEAD, books, held, 10, -100)
    assert kept is not None
    assert (kept.worker, kept.kept, kept.since) == ("a", True, 10)
    kept = keep(HEAD, books, held, 10, -100, {"a"})
    assert kept is not None
    assert (kept.worker, kept.beside) == ("b", {"cpus": 1, "slots": 99})
    assert keep(HEAD, books, held, 10, -100, {"a", "b"}) is None


def test_worker_is_kept_once_waiting_costs_more_than_an_idle_worker() -> None:
    book, held = running("w", 10, Held(need(5), 0), Held(need(3), 60))
    # From 100 on, 2 CPUs would be idle for 40 ms, and 5 for another 60: 380. The head waits with 8.
    assert fits(need(8), book) is not None
    assert keep(Waiting("head", need(8), 0), [book], {"w": held}, 100, 100 - WORTH * 380 // 8) is not None
    assert keep(Waiting("head", need(8), 0), [book], {"w": held}, 100, 101 - WORTH * 380 // 8) is None


def test_kept_worker_counts_the_jobs_that_started_since() -> None:
    book, held = running("w", 10, Held(need(5), 0), Held(need(1), 20))
    kept = Reservation("w", HEAD.shape, HEAD.order, 0, {}, since=10)
    further = kept_further(kept, HEAD, [book], {"w": held})
    assert further is not None
    assert further.beside == {"cpus": 1, "slots": 98}
    closed = running("w", 10, admitting=False)[0]
    assert kept_further(kept, HEAD, [closed], {"w": []}) is None


# -- who passes


def test_job_passes_if_it_ends_before_the_reserved_time() -> None:
    assert passes(waits("later", 4, 6, expected=60), reserved(), 40)
    assert not passes(waits("later", 4, 6, expected=61), reserved(), 40)
    assert not passes(waits("later", 4, 6), reserved(), 40)
    # Expected times do not count where a worker is kept.
    assert not passes(waits("later", 4, 6, expected=1), reserved(at=0), 40)


def test_job_passes_if_it_fits_beside_the_head() -> None:
    assert passes(waits("later", 2, 6), reserved(cpus_beside=2), 40)
    assert not passes(waits("later", 3, 6), reserved(cpus_beside=2), 40)
    assert not passes(Waiting("later", need(1, gpus=1), order(0, 6)), reserved(cpus_beside=2), 40)


def test_reservation_of_a_lower_job_delays_no_higher_one() -> None:
    assert passes(waits("higher", 8, 9, priority=1), reserved(), 40)
    assert passes(waits("earlier", 8, 4), reserved(), 40)
    assert passes(HEAD, reserved(), 40)


def test_start_beside_the_head_takes_of_the_room_there() -> None:
    left = after_start(waits("later", 2, 6), reserved(cpus_beside=3), 40)
    assert left is not None
    assert left.beside == {"cpus": 1, "slots": 89}
    # A job that ends before takes nothing.
    assert after_start(waits("later", 2, 6, expected=1), reserved(cpus_beside=3), 40) == reserved(cpus_beside=3)
    assert after_start(HEAD, reserved(), 40) is None


def test_pass_over_a_reserved_worker_takes_only_jobs_that_pass() -> None:
    book, _ = running("w", 10, Held(need(5), 0, 100))
    later = [waits("long", 2, 6), waits("short", 2, 7, expected=60), waits("beside", 1, 8), waits("over", 2, 9)]
    admitted, kept = fill_or_keep(book, [HEAD, *later], 32, reservation=reserved(cpus_beside=3), now=40)
    assert ([waiting.job for waiting in admitted], kept) == (["long", "short", "beside"], "")
    # The head itself ends the reservation.
    admitted, _ = fill_or_keep(running("w", 10)[0], [HEAD, *later], 32, reservation=reserved(), now=40)
    assert [waiting.job for waiting in admitted] == ["head", "long"]


# -- properties

HELD = st.lists(st.builds(Held, st.integers(0, 4).map(need), st.integers(0, 50), st.integers(0, 90)), max_size=5)


@given(HELD, st.integers(0, 9), st.integers(0, 60))
def test_earliest_start_has_room_by_the_expected_ends(held: list[Held], cpus: int, now: int) -> None:
    book, _ = running("w", 12, *held)
    start = earliest_start(need(cpus), book, held, now)
    at_start, before = running("w", 12)[0], running("w", 12)[0]
    for entry in held:
        end = expected_end(entry, now)
        at_start = at_start if 0 < end <= start else at_start.holding(entry.request)
        before = before if 0 < end < start else before.holding(entry.request)
    if start:
        assert start >= now
        assert fits(need(cpus), at_start) is None
        assert start == now or fits(need(cpus), before) is not None
    elif now:
        assert any(not entry.expected for entry in held) or cpus > 12


@given(HELD, st.integers(1, 12), st.integers(0, 60), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 90))))
def test_passing_jobs_never_delay_the_reserved_start(
    held: list[Held], cpus: int, now: int, others: list[tuple[int, int]]
) -> None:
    """With true times, the head has its room at the reserved time whatever passed it."""
    book, _ = running("w", 12, *held)
    head = waits("head", cpus, 0)
    reservation = reserve(head, [book], {"w": held}, now)
    if reservation is None or reservation.at == now:
        return
    backlog = [waits(str(seq), size, seq, expected) for seq, (size, expected) in enumerate(others, start=1)]
    admitted = fill_or_keep(book, backlog, 32, reservation=reservation, now=now).admitted
    then = running("w", 12)[0]
    for entry in held:
        then = then if 0 < expected_end(entry, now) <= reservation.at else then.holding(entry.request)
    for waiting in admitted:
        expected = waiting.run_time.expected
        ended = expected and now + expected <= reservation.at
        then = then if ended else then.holding(waiting.request)
    assert fits(head.request, then) is None


# -- another priority


def test_kept_worker_stays_kept_once_the_head_has_another_priority() -> None:
    book, held = running("w", 9, Held(need(9), 0), Held(need(1), 5))
    rules, patience = Rules(1, 100), Patience()
    kept = Reservation("w", HEAD.shape, HEAD.order, 0, {}, since=10)
    patience.looks[HEAD.shape] = (HEAD.order, 10, False)
    raised = replace(HEAD, order=order(1, 5))
    renewed = renew([raised], [book], {"w": held}, 50, rules, {"w": kept}, patience, {HEAD.shape: raised})
    assert renewed.reservations["w"].kept
    assert renewed.reservations["w"].order == raised.order
    assert patience.looks[HEAD.shape][:2] == (raised.order, 10)
