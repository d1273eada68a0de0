"""Rows that the ledger should know, in order: jobs that wait, are due, never arrived, or came too late.

A job whose row is marked as revoked is left out: the sweep ends it, and until then nothing may start it.
The functions only read, each on the caller's connection.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.policy.unknown_starts import losses_in_doubt


@dataclass(frozen=True, slots=True)
class Pending:
    """A row that the ledger should know, as the arguments of a submit."""

    id: str
    name: str
    shape: str
    priority: int
    seq: int
    message: bytes
    attempt: int
    losses: int
    submitted_ms: int
    #: When the row was read, in milliseconds of this process's clock.
    read_ms: float
    #: False: the first lost attempt ends the job.
    rerun: bool = True

    def submission(self) -> tuple[Any, ...]:
        """Return the arguments of `Ledger.submit`, in order."""
        return (
            self.id,
            filed_shape(self.shape, self.name),
            order(self.priority, self.seq),
            self.message,
            self.attempt,
            self.losses,
            self.submitted_ms,
            self.read_ms,
            self.rerun,
        )


def in_doubt(row: Pending, most_losses: int) -> Pending:
    """Return a row as it is submitted where an attempt may have started without Postgres knowing it."""
    return replace(row, attempt=row.attempt + 1, losses=losses_in_doubt(row.losses, most_losses, row.rerun))


_PENDING: Final = (
    "SELECT id, name, shape, priority, seq, message, attempt, losses, "
    "(extract(epoch FROM submitted_at) * 1000)::bigint, rerun FROM jobs "
)
_DUE: Final = text(
    _PENDING + "WHERE state = 'scheduled' AND revoked_at IS NULL AND due_at <= now() "
    "AND seq > :after ORDER BY seq LIMIT :most"
)
_STRANDED: Final = text(
    _PENDING + "WHERE state = 'accepted' AND revoked_at IS NULL "
    "AND submitted_at <= now() - make_interval(secs => :age) "
    "AND seq > :after ORDER BY seq LIMIT :most"
)
_BACKLOG: Final = text(
    _PENDING + "WHERE state IN ('accepted', 'waiting') AND revoked_at IS NULL AND (-priority, seq) > (:priority, :seq) "
    "ORDER BY -priority, seq LIMIT :most"
)
_THESE: Final = text(
    _PENDING + "WHERE id = ANY(CAST(:ids AS text[])) "
    "AND revoked_at IS NULL AND (state IN ('accepted', 'waiting') OR (state = 'scheduled' AND due_at <= now()))"
)


def _pending(connection: Connection, statement: Any, values: dict[str, Any]) -> list[Pending]:
    now = time.time() * 1000
    rows = connection.execute(statement, values)
    return [
        Pending(row[0], row[1], row[2], row[3], row[4], bytes(row[5]), row[6], row[7], row[8], now, row[9])
        for row in rows
    ]


def due(connection: Connection, most: int, after: int = 0) -> list[Pending]:
    """Return scheduled jobs whose time has come, in order of submission after a `seq`."""
    return _pending(connection, _DUE, {"most": most, "after": after})


def stranded(connection: Connection, age: float, most: int, after: int = 0) -> list[Pending]:
    """Return accepted jobs that did not reach the ledger within `age` seconds, by submission after a `seq`."""
    return _pending(connection, _STRANDED, {"age": age, "most": most, "after": after})


def backlog(connection: Connection, most: int, after: tuple[int, int] = (-10, 0)) -> list[Pending]:
    """Return waiting jobs in the order of the backlog, after a cursor (-priority, seq)."""
    return _pending(connection, _BACKLOG, {"most": most, "priority": after[0], "seq": after[1]})


def these(connection: Connection, ids: Sequence[str]) -> list[Pending]:
    """Return those of the named jobs that have not started and may start now."""
    return _pending(connection, _THESE, {"ids": list(ids)}) if ids else []


_ACCEPTED: Final = text(
    _PENDING + "WHERE id = ANY(CAST(:ids AS text[])) AND state = 'accepted' AND revoked_at IS NULL ORDER BY seq"
)


def accepted(connection: Connection, ids: Sequence[str]) -> list[Pending]:
    """Return those of the named jobs that the ledger has not reported yet, in order of submission."""
    return _pending(connection, _ACCEPTED, {"ids": list(ids)})


_OVERDUE: Final = text(
    "SELECT id FROM jobs WHERE expires_at <= now() AND expires_at IS NOT NULL "
    "AND state IN ('accepted', 'waiting', 'scheduled') ORDER BY expires_at LIMIT :most"
)


def overdue(connection: Connection, most: int) -> list[str]:
    """Return the ids of jobs that have not started and have expired, the earliest expiry first."""
    return list(connection.execute(_OVERDUE, {"most": most}).scalars())
