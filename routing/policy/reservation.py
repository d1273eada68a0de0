"""Reservations with backfill: a wide job gets its turn though narrower ones keep coming. Pure decisions over values.

Without this rule the policy is greedy: a job that does not fit holds up no other, so a wide job starts when by chance
enough is free at once. The rule is EASY backfill. A job that comes later in order may still start first, if it does not
delay the start that is reserved for the blocked one.

- **Head.** The first waiting shape in order of which no job has room now, though a worker would have it, were it empty.
  `depth` is the number of such shapes that get a reservation: 0 is greedy, 1 is EASY. A paused shape gets none.
- **Reservation.** A worker and the time at which the head can start there: the soonest by the expected ends of the jobs
  that run. A worker that ends at a known time must last until the head has ended, by its bound. A worker carries one
  reservation at a time, so that the next shape in order reserves another worker.
- **Alternatives.** A worker is reserved for the first alternative of a head that its quota allows and that a worker
  would have room for, were it empty. The head still starts by whichever alternative fits first.
- **Passing.** Later jobs start on the reserved worker if they end before that time, or fit beside the head. On other
  workers nothing changes. A job that comes earlier in order ignores the reservation, so that a reservation of a lower
  priority delays no higher one.
- **Turns.** Where tenants share the workers, order means `place_in_line`: the priority, then the turn of the tenant by
  the shares of now, then the submission. So no tenant's flood reserves the workers that are another tenant's turn. Of
  one tenant, and of equal turns, the earlier submission comes first.
- **Keeping.** Expected times may be unknown or wrong. So a worker is kept for a head that has not started so long after
  the time that was first reserved for it, or after it became the head, where no time is known. It is a worker where the
  head would have room by now, had no job started since that time. So a head that waits for jobs which ran before it
  costs the others nothing, however long these run. And by waiting the head has lost several times as much as the worker
  loses by being idle, if each job there runs as long again as it has run. All jobs that ran there before the keeping
  will end one day. A later job starts there only if it fits beside the head, together with all that started since. The
  worker stays the same until the head starts.
- **Overruns.** A job that runs longer than expected is expected to need an eighth more, and at least as long again as
  it is late. So the pause grows, and a wrong expectation is asked about ever more seldom.

Sources: D. Lifka, "The ANL/IBM SP Scheduling System", JSSPP 1995, for EASY. A. Mu'alem and D. Feitelson, "Utilization,
Predictability, Workloads, and User Runtime Estimates in Scheduling the IBM SP2 with Backfilling", IEEE TPDS 12(6),
2001, for what a reservation may be delayed by. D. Tsafrir, Y. Etsion and D. Feitelson, "Backfilling Using
System-Generated Predictions Rather than User Runtime Estimates", IEEE TPDS 18(6), 2007, for overruns of predictions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from celery_capacity.routing.model.amounts import ALONE, CPUS, SLOTS
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import CANDIDATES, SUBMISSIONS, Book, Waiting, fits
from celery_capacity.routing.policy.tenants import Sharing, within_quota

#: Share of its expected time by which a job that overran is expected to go on at least: one in so many.
OVERRUN_SHARE: Final = 8


#: Loss of a head by waiting, over the loss of a worker that is idle for it, from which it is kept. Others wait, too.
WORTH: Final = 4

#: Milliseconds for which a head is blocked before a worker is kept for it.
RESERVE_AFTER_MS: Final = 60_000


@dataclass(frozen=True)
class Rules:
    """Settings of backfill.

    `depth`: the number of blocked shapes with a reservation; 0 is greedy, 1 is EASY. `reserve_after`: milliseconds for
    which a head is blocked, beyond the first time reserved for it, before a worker is kept for it where others passed.
    """

    depth: int = 1
    reserve_after: int = RESERVE_AFTER_MS


class Held(NamedTuple):
    """A job on a worker: its request, the time of its admission, and its expected run time (ms, 0 means unknown)."""

    request: Request
    admitted: int
    expected: int = 0


@dataclass(frozen=True)
class Reservation:
    """A worker for the head of a shape, from a time on.

    `order`: that of the head. `at`: the time (ms) at which the head is expected to start; 0 where the worker is kept
    until it does. `beside`: amounts that later jobs may hold on the worker at that time. `since`: the time from which
    the worker is kept.
    """

    worker: str
    shape: str
    order: int
    at: int
    beside: Mapping[str, int]
    since: int = 0

    @property
    def kept(self) -> bool:
        """Return True if the worker is kept for the head, whatever the expected times say."""
        return not self.at


def expected_end(held: Held, now: int) -> int:
    """Return the time (ms) at which a running job is expected to end, later than now; 0 where it is unknown."""
    if not held.expected:
        return 0
    end = held.admitted + held.expected
    if end > now:
        return end
    return now + max(now - end, held.expected // OVERRUN_SHARE, 1)


def earliest_start(request: Request, book: Book, held: Sequence[Held], now: int) -> int:
    """Return the earliest time (ms) at which a worker has room by the expected ends there; 0 where it is unknown.

    Nothing else is admitted meanwhile. A job with an unknown end is taken to stay.
    """
    if fits(request, book) is None:
        return now
    ends = sorted((end, number) for number, job in enumerate(held) if (end := expected_end(job, now)))
    for end, number in ends:
        book = book.without(held[number].request)
        if fits(request, book) is None:
            return end
    return 0


def room_beside(request: Request, book: Book, staying: Iterable[Request]) -> dict[str, int]:
    """Return what is left on a worker for others while it holds these requests, and the reserved one."""
    left = {name: amount - request.get(name) for name, amount in book.capacity.items()}
    if request.get(ALONE):
        return {}
    for other in staying:
        for name, amount in other.amounts:
            left[name] = left.get(name, 0) - amount
    return {name: amount for name, amount in left.items() if amount > 0}


def large_enough(head: Waiting, books: Iterable[Book]) -> list[Book]:
    """Return the workers that admit, take a job, and would have room for it, were they empty.

    Of many, only some are looked at: those with the most free CPUs.
    """
    able = [
        book
        for book in books
        if book.admitting
        and head.request.get(CPUS) <= book.capacity.get(CPUS, 0)
        and book.takes(head)
        and fits(head.request, replace(book, allocated={}, kept="")) is None
    ]
    if len(able) > CANDIDATES:
        able.sort(key=lambda book: (-book.free(CPUS), book.worker))
        del able[CANDIDATES:]
    return able


def planned(waiting: Waiting, books: Sequence[Book], sharing: Sharing | None = None) -> Waiting:
    """Return a job with the alternative for which a worker is reserved; else with the first one."""
    if len(waiting.alternatives) == 1:
        return waiting
    return next((entry for entry in within_quota(waiting, sharing) if large_enough(entry, books)), waiting)


def reserve(
    head: Waiting, books: Iterable[Book], held: Mapping[str, Sequence[Held]], now: int, taken: Collection[str] = ()
) -> Reservation | None:
    """Return the reservation of the worker where a blocked job can start soonest, or None where no time is known.

    `held`: the jobs on each worker. `taken`: workers that carry the reservation of an earlier job. Of several workers
    with the same time, the one with the fewest free CPUs is chosen, then the first by name.
    """
    starts = [
        (start, book.free(CPUS), book.worker, book)
        for book in large_enough(head, books)
        if book.worker not in taken and not book.kept
        if (start := earliest_start(head.request, book, held.get(book.worker, ()), now))
        and book.lasts(start - now + head.run_time.bound)
    ]
    if not starts:
        return None
    at, _, worker, book = min(starts, key=lambda start: start[:3])
    staying = [job.request for job in held.get(worker, ()) if not 0 < expected_end(job, now) <= at]
    return Reservation(worker, head.shape, head.order, at, room_beside(head.request, book, staying))


def has_passed(head: Waiting, book: Book, held: Iterable[Held], since: int) -> bool:
    """Return True if a job would have room on a worker, had none started there since a time (ms)."""
    for job in held:
        if job.admitted >= since:
            book = book.without(job.request)
    return fits(head.request, book) is None


def is_worth_keeping(head: Waiting, book: Book, held: Iterable[Held], now: int, since: int) -> bool:
    """Return True if a job has lost more by waiting than a worker would lose by being idle until there is room.

    Each job there is taken to run as long again as it has run. Losses are amounts times milliseconds, of the resource
    of which the job asks for the largest share.
    """
    asked = [(amount / book.capacity.get(name, 1), name) for name, amount in head.request.amounts if name != ALONE]
    name = max(asked, default=(0, SLOTS))[1]
    idle = book.free(name)
    lost = last = 0
    for job in sorted(held, key=lambda job: -job.admitted):
        if fits(head.request, book) is None:
            break
        age = now - job.admitted
        lost, last = lost + idle * (age - last), age
        idle, book = idle + job.request.get(name), book.without(job.request)
    return (now - since) * head.request.get(name) >= WORTH * lost


def keep(
    head: Waiting,
    books: Iterable[Book],
    held: Mapping[str, Sequence[Held]],
    now: int,
    since: int,
    taken: Collection[str] = (),
) -> Reservation | None:
    """Return the reservation of a worker that is kept for a job from now on, or None where no worker is worth it.

    `since`: the time from which the job waits too long. The worker is the one that `reserve` chooses of those where
    other jobs passed. Where no time is known, it is the one with the fewest CPUs missing, then the first by name.
    """
    able = [
        book
        for book in large_enough(head, books)
        if book.worker not in taken
        and not book.kept
        and has_passed(head, book, held.get(book.worker, ()), since)
        and is_worth_keeping(head, book, held.get(book.worker, ()), now, since)
    ]
    if not able:
        return None
    timed = reserve(head, able, held, now)
    missing = {book.worker: max(0, head.request.get(CPUS) - book.free(CPUS)) for book in able}
    book = min(able, key=lambda book: (timed is None or book.worker != timed.worker, missing[book.worker], book.worker))
    return Reservation(book.worker, head.shape, head.order, 0, room_beside(head.request, book, ()), since=now)


def kept_further(
    reservation: Reservation, head: Waiting, books: Iterable[Book], held: Mapping[str, Sequence[Held]]
) -> Reservation | None:
    """Return the reservation of a kept worker anew, or None where the worker can no longer take the job.

    All jobs that started on it since count as staying beside the head. Room of those that ended is free again.
    """
    mine = [book for book in books if book.worker == reservation.worker]
    for book in large_enough(head, mine):
        staying = [job.request for job in held.get(book.worker, ()) if job.admitted >= reservation.since]
        beside = room_beside(head.request, book, staying)
        return replace(reservation, order=head.order, beside=beside)
    return None


def is_same_job(order: int, other: int) -> bool:
    """Return True if two orders are of one job. Another priority, by an operator or its age, is no other job."""
    return order >= 0 and order % SUBMISSIONS == other % SUBMISSIONS


class Patience:
    """Record of when each head ought to have started: at the time that was first reserved for it, once one is known.

    `looks`: for each shape, the order of its first job, the time (ms) from which that waits too long, and True if this
    is a time that was reserved for it.
    """

    def __init__(self) -> None:
        self.looks: dict[str, tuple[int, int, bool]] = {}

    def since(self, head: Waiting, now: int) -> int:
        """Return the time from which a head waits too long; from now on for a new head."""
        order, since, promised = self.looks.get(head.shape, (-1, 0, False))
        if not is_same_job(order, head.order):
            since, promised = now, False
        self.looks[head.shape] = (head.order, since, promised)
        return since

    def promise(self, reservation: Reservation) -> None:
        """Note the time that is reserved for a head, if it is the first one."""
        order, since, promised = self.looks[reservation.shape]
        if reservation.at and not promised:
            self.looks[reservation.shape] = (order, max(since, reservation.at), True)

    def forget(self, waiting: Collection[str]) -> None:
        """Forget the shapes that wait no more."""
        self.looks = {shape: look for shape, look in self.looks.items() if shape in waiting}


class Renewed(NamedTuple):
    """Reservations by worker, and the changes since the last time.

    `overruns`: reserved times that passed before the head could start. `keepings`: workers that are kept from now on.
    """

    reservations: dict[str, Reservation]
    overruns: int = 0
    keepings: int = 0


def renew(
    heads: Sequence[Waiting],
    books: Sequence[Book],
    held: Mapping[str, Sequence[Held]],
    now: int,
    rules: Rules,
    before: Mapping[str, Reservation],
    patience: Patience,
    firsts: Mapping[str, Waiting],
) -> Renewed:
    """Make the reservations anew, the earlier head first.

    `heads`: the first jobs of the blocked shapes that get one, in order. `before`: the reservations until now, by
    worker. `firsts`: for each shape that has a reservation and still waits, its first job. Jobs are `planned`.

    A worker that is kept stays so while its job waits, also when a job of a higher priority is the head by then.
    """
    earlier = {entry.shape: entry for entry in before.values()}
    made: dict[str, Reservation] = {}
    overruns = keepings = 0
    for head in heads:
        old = earlier.pop(head.shape, None)
        overruns += old is not None and is_same_job(old.order, head.order) and 0 < old.at < now
        since, entry = patience.since(head, now), None
        if old is not None and old.kept and is_same_job(old.order, head.order) and old.worker not in made:
            entry = kept_further(old, head, books, held)
        if entry is None and now - since >= rules.reserve_after:
            entry = keep(head, books, held, now, since, made)
            keepings += entry is not None
        if entry is None and (entry := reserve(head, books, held, now, made)):
            patience.promise(entry)
        if entry is not None:
            made[entry.worker] = entry
    for old in earlier.values():
        first = firsts.get(old.shape)
        if old.kept and old.worker not in made and first is not None and is_same_job(old.order, first.order):
            further = kept_further(old, first, books, held)
            if further is not None:
                made[old.worker] = further
    return Renewed(made, overruns, keepings)


def place_in_line(shape: str, order: int, sharing: Sharing | None) -> tuple[int, bool, int, int]:
    """Return the place of a job among all that wait: by priority, by the turn of its tenant, by order."""
    borrows, level = (False, 0) if sharing is None else sharing.turn(shape)
    return order // SUBMISSIONS, borrows, level, order


def passes(waiting: Waiting, reservation: Reservation | None, now: int, sharing: Sharing | None = None) -> bool:
    """Return True if a job may start now on a worker with this reservation, as far as there is room."""
    if reservation is None or comes_first(waiting, reservation, sharing):
        return True
    return _ends_before(waiting, reservation, now) or all(
        amount <= reservation.beside.get(name, 0) for name, amount in waiting.request.amounts
    )


def first_fitting(
    waiting: Waiting, book: Book, reservation: Reservation | None = None, now: int = 0, sharing: Sharing | None = None
) -> Waiting | None:
    """Return a job with its first alternative that may start on a worker now; None where none may."""
    for entry in within_quota(waiting, sharing):
        if fits(entry.request, book) is None and passes(entry, reservation, now, sharing):
            return entry
    return None


def is_taken(
    waiting: Waiting, book: Book, reservation: Reservation | None, now: int, sharing: Sharing | None = None
) -> bool:
    """Return True if a worker is about to take a job, so that nothing is to be reserved for it."""
    return book.open and first_fitting(waiting, book, reservation, now, sharing) is not None


def comes_first(waiting: Waiting, reservation: Reservation, sharing: Sharing | None = None) -> bool:
    """Return True if a job comes before the reserved one, or is that one."""
    reserved = place_in_line(reservation.shape, reservation.order, sharing)
    return place_in_line(waiting.shape, waiting.order, sharing) <= reserved


def after_start(waiting: Waiting, reservation: Reservation | None, now: int) -> Reservation | None:
    """Return a worker's reservation after a job started there: with less beside the head, or None if it was the head.

    A job that ends before the reserved time takes nothing from the room beside the head.
    """
    if reservation is None or (waiting.shape, waiting.order) == (reservation.shape, reservation.order):
        return None
    if _ends_before(waiting, reservation, now):
        return reservation
    asked = dict(waiting.request.amounts)
    left = {name: amount - asked.get(name, 0) for name, amount in reservation.beside.items()}
    return replace(reservation, beside={name: amount for name, amount in left.items() if amount > 0})


def _ends_before(waiting: Waiting, reservation: Reservation, now: int) -> bool:
    expected = waiting.run_time.expected
    return expected > 0 and now + expected <= reservation.at
