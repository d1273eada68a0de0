"""Reconcile's second half: the ledger agrees with itself.

Each job stands where its own key says: in the queue of its shape, in the list of its worker, among the deliveries to
come. Each book is the sum of what its worker holds, and the whole is the sum of the books. What looks different is
repaired by a script that checks once more, so work that goes on meanwhile is never taken for drift.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.snapshot import JobCard
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.placement import waits_beside
from celery_capacity.routing.recovery.drift import Reconciled

#: Jobs looked at in one step: some 2 ms of the server.
CHUNK: Final = 500
#: How often the sum is read again because workers came or admissions went on.
TRIES: Final = 10


def clear_marks(ledger: Ledger, cards: Mapping[str, JobCard], result: Reconciled) -> bool:
    """Take away what says that Postgres is behind on a job where the stream has no such entry (it was lost). True when
    there was one: the card is to be judged like any other now."""
    marked = [(job, card.entry) for job, card in cards.items() if card.entry is not None]
    pipe = ledger.client.pipeline(transaction=False)
    for _, entry in marked:
        pipe.xrange(keys.STREAM, min=entry, max=entry, count=1)
    gone = [pair for pair, found in zip(marked, pipe.execute(), strict=True) if not found]
    # The scripts write both or none: a card that has the same entry after that entry was missed is wrong.
    again = snapshot.read_cards(ledger.client, [job for job, _ in gone])
    orphans = [(entry, job) for job, entry in gone if job in again and again[job].entry == entry]
    ledger.forget(orphans)
    for _ in orphans:
        result.note("a transition that was lost with the stream")
    return bool(orphans)


def check_jobs(connection: Connection, ledger: Ledger, cards: Mapping[str, JobCard], result: Reconciled) -> list[str]:
    """Put jobs where their keys say; returns those that are held by a worker, or a former
    life of one, which has no book and is not alive."""
    pipe = ledger.client.pipeline(transaction=False)
    for job, card in cards.items():
        if card.state == State.WAITING:
            pipe.zscore(keys.wait(card.shape or ""), job)
        else:
            pipe.hget(keys.held(card.worker or ""), job)
        pipe.zscore(keys.UNCLAIMED, job)
    replies = iter(pipe.execute())
    holders = {card.worker for card in cards.values() if card.state != State.WAITING and card.worker is not None}
    found = snapshot.read_books(ledger.client, holders)
    lives = {(name, book.incarnation) for name, book in found.items() if book.epoch == ledger.epoch}
    strays = []
    for job, card in cards.items():
        place, due = next(replies), next(replies)
        if card.state == State.WAITING:
            if (place is None or int(place) != card.order) and ledger.mend(card.shape or "", job):
                result.note("waiting without its place")
                ledger.place(card.shape or "")
            continue
        seated = place is not None and snapshot.text(place) == card.token and (card.worker, card.incarnation) in lives
        delivered = (due is not None) == (card.state == State.ADMITTED)
        if not (seated and delivered) and not _seat(connection, ledger, job, card, result):
            strays.append(job)
    return strays


def _seat(connection: Connection, ledger: Ledger, job: str, card: JobCard, result: Reconciled) -> bool:
    seated = ledger.seat(job)
    if seated is None and give_home(connection, ledger, card.worker or "", result):
        seated = ledger.seat(job)
    if seated:
        result.note("held without its place")
    return seated is not None


_CAPACITY: Final = text("""
SELECT incarnation, capacity FROM workers WHERE name = :name AND status IN ('ready', 'draining')
ORDER BY started_at DESC LIMIT 1
""")


def give_home(connection: Connection, ledger: Ledger, worker: str, result: Reconciled) -> bool:
    """A closed book for a worker whose book went missing, with what it holds: it registers again when it lives, and is
    lost after the usual grace when it does not. False where Postgres knows of no such worker."""
    row = connection.execute(_CAPACITY, {"name": worker}).one_or_none()
    if row is None or not ledger.reserve(worker, row[0], Capacity.from_people(row[1]).shape):
        return False
    result.note("a worker without a book")
    return True


def check_queues(ledger: Ledger, shapes: set[str], resources: set[str], result: Reconciled) -> None:
    """Each queue of a shape holds jobs that wait, in their order, and the indexes of shapes know it; what is to be
    delivered again was admitted. `shapes`: those of which there is a queue; `resources`: those of which there is an
    index of shapes."""
    for resource in sorted(resources):
        for shape in map(snapshot.text, ledger.client.zrange(keys.shapes_of(resource), 0, -1)):
            if waits_beside(shape) != resource and ledger.mend(shape, seen_in=resource):
                result.note("a shape out of its place")
            shapes.add(shape)
    for shape in sorted(shapes | {snapshot.text(shape) for shape in ledger.client.zrange(keys.SHAPES, 0, -1)}):
        seen, looked = 0, CHUNK
        while looked == CHUNK:
            looked, strays = ledger.misplaced(shape, seen, CHUNK)
            seen += looked
            for job in strays:
                if ledger.mend(shape, job):
                    result.note("a place without its waiting job")
                    seen -= 1  # all before it are nearer to the end now
        if ledger.mend(shape):
            result.note("a shape out of its place")
    for jobs in _chunks(ledger.client.zscan_iter(keys.UNCLAIMED, count=CHUNK)):
        cards = snapshot.read_cards(ledger.client, jobs)
        for job in jobs:
            card = cards.get(job)
            if (card is None or card.state != State.ADMITTED) and ledger.seat(job):
                result.note("a delivery of a job that was not admitted")


def _chunks(scanned: Iterable[Any]) -> Iterator[list[str]]:
    batch: list[str] = []
    for member, _ in scanned:
        batch.append(snapshot.text(member))
        if len(batch) >= CHUNK:
            yield batch
            batch = []
    if batch:
        yield batch


def check_books(ledger: Ledger, workers: set[str], resources: set[str], result: Reconciled) -> None:
    """Each book is the sum of what is held and stands in the indexes, and the whole is the sum of the books.
    `workers`: those of which there is a book or a list; `resources`: those of which there is an index of workers."""
    for resource in sorted(resources):
        seen, looked = 0, CHUNK
        while looked == CHUNK:
            looked, taken = ledger.unlist(resource, seen, CHUNK)
            seen += looked - taken
            for _ in range(taken):
                result.note("a worker in the index of what it does not have")
    names = sorted(workers | _indexed(ledger))
    for worker, differs in zip(names, ledger.recount(names), strict=True):
        if differs:
            result.note("a book that is not the sum")
            ledger.fill(worker)
    for _ in range(TRIES):
        if _check_total(ledger, workers, result):
            return
    result.note("a sum of CPUs that is not the sum of the books", False)


def _indexed(ledger: Ledger) -> set[str]:
    """Return the workers with a lease or a place in the index. A new book gets its lease in the same step."""
    return {snapshot.text(name) for key in (keys.FREE, keys.LEASES) for name in ledger.client.zrange(key, 0, -1)}


def _check_total(ledger: Ledger, workers: set[str], result: Reconciled) -> bool:
    """Compare the sum with the books as of one moment; False where it has to be read again."""
    names = sorted(workers | _indexed(ledger))
    pipe = ledger.client.pipeline(transaction=True)
    pipe.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS)
    pipe.zrange(keys.LEASES, 0, -1)
    for worker in names:
        pipe.hget(keys.book(worker), "a.cpus")
    (found, shown), leases, *parts = pipe.execute()
    if not {snapshot.text(name) for name in leases} <= set(names):
        return False  # a worker came after the names were read
    total = sum(int(part) for part in parts if part is not None)
    said = None if found is None else int(found)
    if said == total and shown is not None and snapshot.text(shown) == amounts.format_cpus(total):
        return True
    # What is admitted and released meanwhile changes the sum as it changes the books: it is right for an equal sum.
    if not ledger.set_total(said, total):
        return False
    result.note("a sum of CPUs that is not the sum of the books")
    return True
