"""Opening a new epoch on a ledger that is cold: it never was open, was emptied, or came back with old books.

One process does it, under an advisory lock in Postgres. Books come first: each worker that Postgres takes for alive
gets a closed book that holds what Postgres says it runs, so that nothing of it is free before the worker has spoken.
The workers see the new epoch, register and say what they hold. Then the backlog is filed, in its order.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, text

from routing import backlog, enroll, keys, pull, reconcile, revoking, roster, stream
from routing.capacity import Capacity
from routing.errors import StoreUnavailable
from routing.ledger import Ledger
from routing.policy import order
from routing.replies import Adopted
from routing.roster import Authority

#: Seconds to wait for the live workers to say what they hold, before the backlog is filed. A worker writes its claims
#: to Postgres within milliseconds; this covers claims that were on their way when the books were lost.
REPORT_WITHIN: Final = 2.0
BACKLOG_CHUNK: Final = 1000
#: Keys removed in one step.
WIPE_CHUNK: Final = 500


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did. `workers`: books written; `held`: jobs entered into them; `filed`: jobs brought back."""

    epoch: int
    workers: int
    held: int
    filed: int


def open_if_cold(engine: Engine, ledger: Ledger) -> Rebuilt | None:
    """Open a new epoch when the ledger is cold, or go on with one whose opener died; None when there is nothing to do,
    or another process is doing it."""
    with engine.connect() as connection:
        known = roster.read_authority(connection)
        if known.age == 0:
            roster.count_from_now(connection)
        if not _is_wanting(known, ledger) or not roster.lock_epoch(connection):
            return None
        try:
            known = roster.read_authority(connection)
            if not _is_wanting(known, ledger):
                return None
            if _is_old(known, ledger):
                opened = ledger.opened()
                # What the old books noted and Postgres does not have yet comes first, if the stream survived.
                stream.apply_all(engine, ledger)
                _wipe(ledger)
                _carry_over(ledger)
                ledger.open(roster.next_epoch(connection, above=opened[0] if opened else 0))
            else:
                ledger.epoch = known.epoch
            return _rebuild(connection, ledger)
        finally:
            roster.unlock_epoch(connection)


def _is_wanting(known: Authority, ledger: Ledger) -> bool:
    """Whether there is something to do, and it is the ledger that is to decide."""
    if known.authority != "ledger" or known.age < roster.pause(ledger.settings.confirm_interval):
        return False
    return _is_old(known, ledger) or ledger.is_unfinished()


def _is_old(known: Authority, ledger: Ledger) -> bool:
    """Whether the books are none, of another life of the server, or of another epoch than Postgres names: an older one
    (Postgres decided meanwhile), or a newer one (Postgres was restored from a backup)."""
    opened = ledger.opened()
    return opened is None or opened != (known.epoch, ledger.run_id)


def _rebuild(connection: Connection, ledger: Ledger) -> Rebuilt:
    """Books, then the backlog. Every step may be done again: what is there already is left as it is."""
    epoch = ledger.epoch
    workers, held = _reserve(connection, ledger)
    _await_reports(ledger, [name for name, _ in workers])
    revoking.tell_all(connection, ledger)
    filed = _file_backlog(connection, ledger)
    ledger.finish(epoch)
    return Rebuilt(epoch, len(workers), held, filed)


def _wipe(ledger: Ledger) -> None:
    """Remove old books; the key of the epoch goes first, so that they admit nothing meanwhile."""
    client = ledger.client
    # (An entry leaves the stream when Postgres has it, and not before.)
    kept = (keys.COUNTERS, keys.DECLARATIONS, keys.STREAM, keys.RUNNER, keys.ASKED)
    keep = {key.encode() for key in kept}
    try:
        client.delete(keys.EPOCH)
        for pattern in ("ledger:*", keys.VIEWS):
            batch: list[bytes] = []
            for key in client.scan_iter(match=pattern, count=WIPE_CHUNK):
                if key not in keep:
                    batch.append(key)
                if len(batch) >= WIPE_CHUNK:
                    client.unlink(*batch)
                    batch = []
            if batch:
                client.unlink(*batch)
    except RedisError as error:
        raise StoreUnavailable(f"the old books cannot be removed: {error}") from error


def _carry_over(ledger: Ledger) -> None:
    """Keep out of the new books the jobs of which the stream still has an entry, since their rows are locked: what
    their rows say is not true yet."""
    jobs = sorted({one.job for one in stream.unapplied(ledger)})
    try:
        for start in range(0, len(jobs), BACKLOG_CHUNK):
            ledger.client.sadd(keys.CARRIED, *jobs[start : start + BACKLOG_CHUNK])
    except RedisError as error:
        raise StoreUnavailable(f"the jobs of older entries cannot be noted: {error}") from error


def _carried(ledger: Ledger) -> set[str]:
    try:
        found: Any = ledger.client.smembers(keys.CARRIED)
    except RedisError as error:
        raise StoreUnavailable(f"the jobs of older entries cannot be read: {error}") from error
    return {job.decode() for job in found}


def bring_in_carried(engine: Engine, ledger: Ledger) -> int:
    """Let in the jobs whose entries of an older epoch Postgres has by now, as their rows say. Returns how many."""
    carried = _carried(ledger)
    if not carried:
        return 0
    free = sorted(carried - {one.job for one in stream.unapplied(ledger)})
    for start in range(0, len(free), BACKLOG_CHUNK):
        some = free[start : start + BACKLOG_CHUNK]
        # (Should this process die after this line, the next reconcile brings them in.)
        ledger.client.srem(keys.CARRIED, *some)
        reconcile.look_at(engine, ledger, some)
    return len(free)


_HELD: Final = text("""
SELECT incarnation, id, epoch, attempt, shape, priority, seq, losses, (extract(epoch FROM admitted_at) * 1000)::bigint,
       (extract(epoch FROM started_at) * 1000)::bigint, rerun
FROM jobs WHERE state IN ('admitted', 'running') AND incarnation IS NOT NULL ORDER BY id
""")


def _reserve(connection: Connection, ledger: Ledger) -> tuple[list[tuple[str, str]], int]:
    """A closed book for each worker that has not left, with what Postgres says it holds."""
    rows = connection.execute(
        text(
            "SELECT DISTINCT ON (name) name, incarnation, capacity, seen_at > now() - make_interval(secs => :ttl) "
            "FROM workers WHERE status IN ('ready', 'draining') ORDER BY name, started_at DESC"
        ),
        {"ttl": ledger.settings.worker_ttl * 2},
    ).all()
    # In one statement: there is no index by incarnation, which every transition would pay for.
    holdings: dict[str, list[Adopted]] = {}
    carried = _carried(ledger)
    for incarnation, *row in connection.execute(_HELD):
        if row[0] in carried:
            continue
        holdings.setdefault(incarnation, []).append(_adopted(row))
    held = 0
    for name, incarnation, capacity, _ in rows:
        ledger.reserve(name, incarnation, Capacity.from_people(capacity).shape)
        found = holdings.get(incarnation, [])
        for start in range(0, len(found), BACKLOG_CHUNK):
            ledger.adopt(name, incarnation, found[start : start + BACKLOG_CHUNK])
        held += len(found)
    # What Postgres says runs on a life of a worker that has ended goes back, or is lost.
    orphans = [one for one in pull.orphans(connection) if one.job not in carried]
    pull.give_back(connection, orphans, None, "its worker has ended", ledger.settings.most_losses)
    return [(row[0], row[1]) for row in rows if row[3]], held


def _adopted(row: Any) -> Adopted:
    job, epoch, attempt, shape, priority, seq, losses, admitted, started, rerun = row
    place = order(priority, seq)
    return Adopted(job, f"{epoch}.{attempt}", shape, place, admitted or 0, started or 0, "", losses, rerun)


def _await_reports(ledger: Ledger, workers: list[str]) -> None:
    """Wait, for a bounded time, until the workers that live have opened their books again."""
    pause = threading.Event()
    end = ledger.now_ms() + REPORT_WITHIN * 1000
    while workers and ledger.now_ms() < end:
        workers = ledger.unreported(workers)
        if workers:
            pause.wait(0.02)


def _file_backlog(connection: Connection, ledger: Ledger) -> int:
    filed, after = 0, (-10, 0)
    while True:
        rows = backlog.backlog(connection, BACKLOG_CHUNK, after)
        if not rows:
            return filed
        filed += enroll.submit_rows(ledger, rows)
        after = (-rows[-1].priority, rows[-1].seq)
