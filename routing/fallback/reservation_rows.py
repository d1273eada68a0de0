"""Rows of the table `reservations`: which worker is reserved for which blocked job while Postgres decides.

The runner of the duties writes the rows, and each worker reads its own row before it pulls. A row counts only in the
epoch in which it was made, and only while its job waits. So a row that nobody takes away holds up nobody for ever, and
a change of the authority voids all rows.

Both writers name the row that they have read. The runner replaces a row only where no job has taken room beside the
head since, and a worker takes jobs only where the runner has not replaced the row. A refused writer reads again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, text

from celery_capacity.routing.policy.placement import Book, Waiting, fits
from celery_capacity.routing.policy.reservation import Reservation, after_start
from celery_capacity.routing.store.claims import Candidate, Passing, waiting_of
from celery_capacity.routing.store.controls import NOT_PAUSED

#: Condition that a job may start now, as far as only its row says.
MAY_START: Final = f"""(state IN ('accepted', 'waiting') OR (state = 'scheduled' AND due_at <= now()))
  AND (expires_at IS NULL OR expires_at > now()) AND revoked_at IS NULL AND {NOT_PAUSED}"""
#: Postgres's clock in milliseconds.
CLOCK: Final = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
#: Columns of a row, with those of its job, null where that does not wait.
_COLUMNS: Final = """r.worker, r.made_at, r.refused, coalesce((extract(epoch FROM r.starts_at) * 1000)::bigint, 0),
  coalesce((extract(epoch FROM r.kept_since) * 1000)::bigint, 0), r.beside,
  jobs.id, jobs.shape, jobs.priority, jobs.seq, jobs.losses, jobs.name"""
_OF_WORKER: Final = text(f"""
SELECT EXISTS (SELECT FROM cordons WHERE worker = :worker), {CLOCK}, {_COLUMNS}
FROM (VALUES (true)) AS here
LEFT JOIN reservations r ON r.worker = :worker AND r.epoch = :epoch AND NOT r.refused
LEFT JOIN jobs ON jobs.id = r.job AND {MAY_START}
""")
_ALL: Final = text(f"""
SELECT a.epoch, {CLOCK}, {_COLUMNS}
FROM authority a
LEFT JOIN reservations r ON true
LEFT JOIN jobs ON jobs.id = r.job AND r.epoch = a.epoch AND {MAY_START}
WHERE a.authority = 'postgres'
""")


@dataclass(frozen=True)
class Row:
    """Reservation as it stands in Postgres.

    `head`: the job, None where it no longer waits, or the row is of another epoch. `made_at` identifies what the runner
    wrote. `refused`: the worker can never hold the job.
    """

    worker: str
    made_at: datetime
    refused: bool
    beside: dict[str, int]
    reservation: Reservation | None
    head: Waiting | None


class Held(NamedTuple):
    """Facts that hold a worker back from jobs that would fit. `now`: Postgres's clock, in milliseconds."""

    cordoned: bool
    now: int
    row: Row | None

    @property
    def reservation(self) -> Reservation | None:
        """Return the reservation that the worker has to keep to."""
        return self.row.reservation if self.row else None

    def passing(self, chosen: Iterable[Candidate], most_losses: int) -> Passing | None:
        """Return the room beside the head once the worker took these jobs; None where it has no reservation."""
        if self.row is None or self.reservation is None:
            return None
        left = self.reservation
        for candidate in chosen:
            after = after_start(waiting_of(candidate, most_losses), left, self.now)
            if after is None:
                break
            left = after
        return Passing(self.row.made_at, left.beside)


class Standing(NamedTuple):
    """All rows in an epoch in which Postgres decides. `now`: Postgres's clock, in milliseconds."""

    epoch: int
    now: int
    rows: list[Row]


def holding_back(connection: Connection, worker: str, epoch: int, most_losses: int) -> Held:
    """Return whether a worker is cordoned, and its reservation, in one statement."""
    cordoned, now, *columns = connection.execute(_OF_WORKER, {"worker": worker, "epoch": epoch}).one()
    row = _row(columns, most_losses)
    return Held(cordoned, now, row if row is not None and row.head is not None else None)


def standing(connection: Connection, most_losses: int) -> Standing | None:
    """Return all rows, also void ones; None where Postgres does not decide."""
    answer = connection.execute(_ALL).all()
    if not answer:
        return None
    rows = [_row(columns, most_losses) for _, _, *columns in answer]
    return Standing(answer[0][0], answer[0][1], [row for row in rows if row is not None])


def _row(columns: Any, most_losses: int) -> Row | None:
    worker, made_at, refused, starts, since, beside, job, shape, priority, seq, losses, name = columns
    if worker is None:
        return None
    if job is None:
        return Row(worker, made_at, refused, beside, None, None)
    head = waiting_of(Candidate(job, shape, priority, seq, losses), most_losses)
    reservation = Reservation(worker, head.shape, head.order, starts, beside, since)
    return Row(worker, made_at, refused, beside, reservation, replace(head, task=name))


def can_hold(book: Book, head: Waiting) -> bool:
    """Return True if a worker would take a job, were it empty."""
    empty = replace(book, allocated={})
    return book.takes(head) and any(fits(entry.request, empty) is None for entry in head.choices)


def refuse(connection: Connection, row: Row, book: Book) -> None:
    """Note that the worker of a row, with this book, cannot hold its job, so that the runner looks for another one.

    A worker whose remaining life alone is too short for the job takes the row away. The runner judges it anew: another
    job of the same task may have a shorter limit.
    """
    if row.head is not None and can_hold(replace(book, left=None), row.head):
        remove(connection, [row])
        return
    connection.execute(
        text("UPDATE reservations SET refused = true WHERE worker = :worker AND made_at = :made_at"),
        {"worker": row.worker, "made_at": row.made_at},
    )


def is_current(connection: Connection, row: Row) -> bool:
    """Return True if the runner has neither replaced a row nor taken it away."""
    statement = "SELECT EXISTS (SELECT FROM reservations WHERE worker = :worker AND made_at = :made_at)"
    return bool(connection.execute(text(statement), {"worker": row.worker, "made_at": row.made_at}).scalar_one())


_PUT: Final = text("""
INSERT INTO reservations (worker, epoch, job, starts_at, kept_since, beside)
SELECT :worker, :epoch, :job, to_timestamp(CAST(:starts AS float) / 1000), to_timestamp(CAST(:since AS float) / 1000),
  CAST(:beside AS jsonb)
WHERE EXISTS (SELECT FROM authority WHERE authority = 'postgres' AND epoch = :epoch)
ON CONFLICT (worker) DO UPDATE SET epoch = excluded.epoch, job = excluded.job, starts_at = excluded.starts_at,
  kept_since = excluded.kept_since, beside = excluded.beside, refused = false, made_at = clock_timestamp()
WHERE reservations.made_at = :made_at AND reservations.beside = CAST(:seen AS jsonb)
""")


def put(connection: Connection, reservation: Reservation, job: str, epoch: int, seen: Row | None) -> None:
    """Write a reservation for a job in place of the row that was seen; write nothing where that has changed since."""
    connection.execute(
        _PUT,
        {
            "worker": reservation.worker,
            "epoch": epoch,
            "job": job,
            "starts": reservation.at or None,
            "since": reservation.since or None,
            "beside": json.dumps(dict(reservation.beside)),
            "made_at": seen.made_at if seen else None,
            "seen": json.dumps(seen.beside) if seen else None,
        },
    )


def remove(connection: Connection, rows: Iterable[Row]) -> None:
    """Take rows away, except those that have been replaced since they were read."""
    pairs = [(row.worker, row.made_at) for row in rows]
    connection.execute(
        text(
            "DELETE FROM reservations USING unnest(CAST(:workers AS text[]), CAST(:made AS timestamptz[])) "
            "AS gone (worker, made_at) WHERE reservations.worker = gone.worker AND reservations.made_at = gone.made_at"
        ),
        {"workers": [worker for worker, _ in pairs], "made": [made_at for _, made_at in pairs]},
    )
