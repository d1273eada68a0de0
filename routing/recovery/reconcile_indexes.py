"""Second half of a reconcile: make the ledger agree with itself.

Each job stands where its own key says: in the queue of its shape, in the list of its worker, among the deliveries to
come. Each book is the sum of the allocations on its worker, and the total is the sum of the books. The use of a tenant
is the sum of what its jobs hold. A difference is repaired by a script that checks once more, so work that goes on
meanwhile is never taken for drift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.ledger import indexes, keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.indexes import ASKED
from celery_capacity.routing.ledger.snapshot import JobCard
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.shape_indexes import waits_beside
from celery_capacity.routing.recovery.drift import Reconciled

#: Jobs looked at in one step: some 2 ms of the server.
CHUNK: Final = 500
#: Readings of the total at the most, where workers come or admissions go on meanwhile.
TRIES: Final = 10


def clear_marks(ledger: Ledger, cards: Mapping[str, JobCard], result: Reconciled) -> bool:
    """Remove the marks that Postgres is behind on a job, where the stream lost the entry of the mark.

    Return True where there was such a mark: the card is now to be judged like any other.
    """
    marked = [(job, card.entry) for job, card in cards.items() if card.entry is not None]
    pipe = ledger.client.pipeline(transaction=False)
    for _, entry in marked:
        pipe.xrange(keys.STREAM, min=entry, max=entry, count=1)
    gone = [pair for pair, entries in zip(marked, pipe.execute(), strict=True) if not entries]
    # The scripts write mark and entry or neither: a card that still names an entry that was missing is wrong.
    again = snapshot.read_cards(ledger.client, [job for job, _ in gone])
    orphans = [(entry, job) for job, entry in gone if job in again and again[job].entry == entry]
    ledger.ack_transitions(orphans)
    for _ in orphans:
        result.note("a transition that was lost with the stream")
    return bool(orphans)


def check_jobs(connection: Connection, ledger: Ledger, cards: Mapping[str, JobCard], result: Reconciled) -> list[str]:
    """Put jobs where their keys say; return those that nobody alive holds.

    Their worker, or the former incarnation of a worker that holds them, has no book and is not alive.
    """
    pipe = ledger.client.pipeline(transaction=False)
    for job, card in cards.items():
        if card.state == State.WAITING:
            pipe.zscore(keys.wait(card.shape or ""), job)
        else:
            pipe.hget(keys.held(card.worker or ""), job)
        pipe.zscore(keys.UNCLAIMED, job)
    replies = iter(pipe.execute())
    holders = {card.worker for card in cards.values() if card.state != State.WAITING and card.worker is not None}
    books = snapshot.read_books(ledger.client, holders)
    live_incarnations = {(name, book.incarnation) for name, book in books.items() if book.epoch == ledger.epoch}
    strays = []
    for job, card in cards.items():
        entry, due = next(replies), next(replies)
        if card.state == State.WAITING:
            if (entry is None or int(entry) != card.order) and ledger.repair_queue(card.shape or "", job):
                result.note("waiting without its place")
                ledger.place_shape(card.shape or "")
            continue
        listed = entry is not None and snapshot.text(entry) == str(card.token)
        listed = listed and (card.worker, card.incarnation) in live_incarnations
        delivered = (due is not None) == (card.state == State.ADMITTED)
        if not (listed and delivered) and not _repair_job(connection, ledger, job, card, result):
            strays.append(job)
    return strays


def _repair_job(connection: Connection, ledger: Ledger, job: str, card: JobCard, result: Reconciled) -> bool:
    repaired = ledger.repair_job(job)
    if repaired is None and restore_book(connection, ledger, card.worker or "", result):
        repaired = ledger.repair_job(job)
    if repaired:
        result.note("held without its place")
    return repaired is not None


_CAPACITY: Final = text("""
SELECT incarnation, capacity, labels FROM workers WHERE name = :name AND status IN ('ready', 'draining')
ORDER BY started_at DESC LIMIT 1
""")


def restore_book(connection: Connection, ledger: Ledger, worker: str, result: Reconciled) -> bool:
    """Write a closed book for a worker whose book went missing, with what it holds.

    A live worker registers again; a dead one is lost after the usual grace. Return False where Postgres knows no such
    worker.
    """
    row = connection.execute(_CAPACITY, {"name": worker}).one_or_none()
    if row is None or not ledger.reserve_book(worker, row[0], Capacity.from_people(row[1]).shape, row[2]):
        return False
    result.note("a worker without a book")
    return True


def restore_waiting(ledger: Ledger, shapes: Iterable[str]) -> None:
    """Set the number of waiting jobs in the ledger anew, by which it knows whether its head of the backlog is full.

    This is no drift: jobs of a shape that comes meanwhile may be missing, and a little more or less does no harm.
    """
    queued = {*shapes, *map(snapshot.text, ledger.client.zrange(keys.SHAPES, 0, -1))}
    pipe = ledger.client.pipeline(transaction=True)
    pipe.hget(keys.EPOCH, "waiting")
    for shape in queued:
        pipe.zcard(keys.wait(shape))
    noted, *numbers = pipe.execute()
    if int(noted or 0) != sum(numbers):
        ledger.set_waiting(int(noted or 0), sum(numbers))


def check_queues(ledger: Ledger, shapes: set[str], resources: set[str], result: Reconciled) -> None:
    """Repair the queues of shapes, the indexes of shapes, and the deliveries to come.

    Each queue holds waiting jobs in their order, and the indexes of shapes know it. Each job that is to be delivered
    again is admitted. `shapes`: those with a queue. `resources`: those with an index of shapes.
    """
    for resource in sorted(resources):
        for shape in map(snapshot.text, ledger.client.zrange(keys.shapes_of(resource), 0, -1)):
            if waits_beside(shape) != resource and ledger.repair_queue(shape, seen_in=resource):
                result.note("a shape out of its place")
            shapes.add(shape)
    for index in (keys.SHAPES, *map(keys.asks, ASKED)):
        shapes |= {snapshot.text(shape) for shape in ledger.client.zrange(index, 0, -1)}
    for shape in sorted(shapes):
        seen, looked = 0, CHUNK
        while looked == CHUNK:
            looked, strays = ledger.find_misplaced(shape, seen, CHUNK)
            seen += looked
            for job in strays:
                if ledger.repair_queue(shape, job):
                    result.note("a place without its waiting job")
                    seen -= 1  # all places before it are nearer to the end now
        if ledger.repair_queue(shape):
            result.note("a shape out of its place")
    for jobs in _chunks(ledger.client.zscan_iter(keys.UNCLAIMED, count=CHUNK)):
        cards = snapshot.read_cards(ledger.client, jobs)
        for job in jobs:
            card = cards.get(job)
            if (card is None or card.state != State.ADMITTED) and ledger.repair_job(job):
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
    """Repair the books, the indexes of workers, and the total.

    Each book is the sum of what its worker holds and stands in the indexes. The total is the sum of the books.
    `workers`: those with a book or a list. `resources`: those with an index of workers.
    """
    for resource in sorted(resources):
        seen, looked = 0, CHUNK
        while looked == CHUNK:
            looked, taken = ledger.prune_index(resource, seen, CHUNK)
            seen += looked - taken
            for _ in range(taken):
                result.note("a worker in the index of what it does not have")
    names = sorted(workers | _indexed(ledger))
    for worker, differs in zip(names, ledger.recount(names), strict=True):
        if differs:
            result.note("a book that is not the sum")
            ledger.fill(worker)
    _check_total(ledger, workers, result)


def check_use(ledger: Ledger, workers: set[str], result: Reconciled) -> None:
    """Make the use of tenants the sum of what their jobs hold.

    An admission or release meanwhile changes the use of its tenant along with the list of the worker. So a sum is right
    where the use has not changed since it was read, and no job has ended: an end and an admission together may leave
    the use as it was. While ends come faster than the jobs can be read, the next reconcile tries again.
    """
    if not ledger.has_tenants():
        return
    newest = ledger.newest_entry()
    use, summed = indexes.read_use(ledger.client), Counter[str]()
    for worker in sorted(workers | _indexed(ledger)):
        held = sorted({job for page in ledger.held_pages(worker) for job in page})
        for start in range(0, len(held), CHUNK):
            cards = snapshot.read_cards(ledger.client, held[start : start + CHUNK])
            summed.update(indexes.use_of(card for card in cards.values() if card.worker == worker))
    wrong = {
        field: (use.get(field, 0), summed[field])
        for field in sorted(use.keys() | summed.keys())
        if use.get(field, 0) != summed[field]
    }
    for _ in range(ledger.set_use(wrong, newest)):
        result.note("a use of a tenant that is not the sum of its jobs")


def restore_lost_total(ledger: Ledger) -> int:
    """Make the total the sum of the books where its key was lost, and return the number of differences.

    Without its key the total counts from 0, so the jobs that were held end below 0. One key is read where all is well,
    so the sweep may look each time. A total that is wrong without this sign waits for the reconcile.
    """
    total: Any = ledger.client.get(keys.ALLOCATED)
    if total is not None and int(total) >= 0:
        return 0
    result = Reconciled()
    _check_total(ledger, set(), result)
    ledger.client.hincrby(keys.COUNTERS, "drift", result.drift)
    return result.drift


def _check_total(ledger: Ledger, workers: set[str], result: Reconciled) -> None:
    for _ in range(TRIES):
        if _total_agrees(ledger, workers, result):
            return
    result.note("a sum of CPUs that is not the sum of the books", False)


def _indexed(ledger: Ledger) -> set[str]:
    """Return the workers with a lease or a place in the index. A new book gets its lease in the same step."""
    return {snapshot.text(name) for key in (keys.FREE, keys.LEASES) for name in ledger.client.zrange(key, 0, -1)}


def _total_agrees(ledger: Ledger, workers: set[str], result: Reconciled) -> bool:
    """Compare the total with the books as of one moment; return False where it has to be read again."""
    names = sorted(workers | _indexed(ledger))
    pipe = ledger.client.pipeline(transaction=True)
    pipe.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS)
    pipe.zrange(keys.LEASES, 0, -1)
    for worker in names:
        pipe.hget(keys.book(worker), "a.cpus")
    (stored, shown), leases, *sums = pipe.execute()
    if not {snapshot.text(name) for name in leases} <= set(names):
        return False  # a worker came after the names were read
    total = sum(int(cpus) for cpus in sums if cpus is not None)
    noted = None if stored is None else int(stored)
    if noted == total and shown is not None and snapshot.text(shown) == amounts.format_cpus(total):
        return True
    # An admission or release meanwhile changes the total along with the books. So the new total is right where the
    # stored one has not changed since it was read.
    if not ledger.set_total(noted, total):
        return False
    result.note("a sum of CPUs that is not the sum of the books")
    return True
