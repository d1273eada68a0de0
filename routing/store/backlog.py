"""Rows that the ledger should know, in order: jobs that wait, are due, never arrived, or came too late.

A job whose row is marked as revoked is left out: the sweep ends it, and until then nothing may start it.
The functions only read, but for `mark_behind` and `end_unfiled`, each on the caller's connection.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.database.staying_rows import STAYS
from celery_capacity.routing.model import outbox
from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.model.states import State, Step
from celery_capacity.routing.policy.placement import SUBMISSIONS, TOP_PRIORITY, order
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
    _PENDING + "WHERE state IN ('accepted', 'waiting') AND behind IS NULL AND revoked_at IS NULL "
    "AND (-priority, seq) > (:priority, :seq) "
    "ORDER BY -priority, seq LIMIT :most"
)
_THESE: Final = text(
    _PENDING + "WHERE id = ANY(CAST(:ids AS text[])) "
    "AND revoked_at IS NULL AND (state IN ('accepted', 'waiting') OR (state = 'scheduled' AND due_at <= now()))"
)


def _pending(connection: Connection, statement: Any, values: dict[str, Any]) -> list[Pending]:
    now = time.time() * 1000
    return [_row(row, now) for row in connection.execute(statement, values)]


def _row(row: Sequence[Any], now: float) -> Pending:
    return Pending(row[0], row[1], row[2], row[3], row[4], bytes(row[5]), row[6], row[7], row[8], now, row[9])


def due(connection: Connection, most: int, after: int = 0) -> list[Pending]:
    """Return scheduled jobs whose time has come, in order of submission after a `seq`."""
    return _pending(connection, _DUE, {"most": most, "after": after})


def stranded(connection: Connection, age: float, most: int, after: int = 0) -> list[Pending]:
    """Return accepted jobs that did not reach the ledger within `age` seconds, by submission after a `seq`."""
    return _pending(connection, _STRANDED, {"age": age, "most": most, "after": after})


def backlog(connection: Connection, most: int, after: tuple[int, int] = (-10, 0)) -> list[Pending]:
    """Return waiting jobs in the order of the backlog, after a cursor (-priority, seq); none that stays in Postgres."""
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


# -- waiting jobs that stay in Postgres: a marked row is not in the ledger --------------------------------------------

_MARK: Final = text("""
WITH x AS (
  SELECT jobs.id, x.shape FROM unnest(CAST(:ids AS text[]), CAST(:shapes AS text[])) AS x (id, shape)
  JOIN jobs ON jobs.id = x.id
  WHERE behind IS NULL AND revoked_at IS NULL
    AND (state = 'accepted' OR (state = 'scheduled' AND due_at <= now()) OR (state = 'waiting' AND :waiting))
  FOR NO KEY UPDATE OF jobs SKIP LOCKED
)
UPDATE jobs SET state = 'waiting', behind = x.shape FROM x WHERE jobs.id = x.id RETURNING x.shape
""")
#: Rows that the ledger may have left in Postgres unmarked.
_WITHOUT_MESSAGE: Final = (
    "SELECT id, name, shape, priority, seq, losses FROM jobs"
    " WHERE revoked_at IS NULL AND (-priority, seq) > (:priority, :seq)"
)
_UNMARKED: Final = text(f"""
SELECT * FROM (
  ({_WITHOUT_MESSAGE} AND state = 'accepted' ORDER BY -priority, seq LIMIT :most)
  UNION ALL ({_WITHOUT_MESSAGE} AND state = 'scheduled' AND due_at <= now() ORDER BY -priority, seq LIMIT :most)
) AS x ORDER BY -priority, seq LIMIT :most
""")
#: Asked for each shape apart by its own index, so that no statement sorts the backlog.
_FETCH: Final = text(f"""
WITH x AS (
  SELECT asked.shape AS filed, head.id
  FROM unnest(CAST(:shapes AS text[]), CAST(:most AS int[]), CAST(:levels AS int[]), CAST(:seqs AS bigint[]))
    AS asked (shape, most, level, until)
  CROSS JOIN LATERAL (
    SELECT id FROM jobs WHERE behind = asked.shape AND {STAYS} AND (-priority, seq) < (asked.level, asked.until)
    ORDER BY -priority, seq LIMIT asked.most FOR NO KEY UPDATE SKIP LOCKED
  ) AS head
)
UPDATE jobs SET state = 'accepted', behind = NULL FROM x WHERE jobs.id = x.id
RETURNING jobs.id, name, shape, priority, seq, message, attempt, losses,
  (extract(epoch FROM submitted_at) * 1000)::bigint, rerun, x.filed
""")
_NEXT: Final = text(f"""
SELECT asked.shape, head.priority, head.seq FROM unnest(CAST(:shapes AS text[])) AS asked (shape)
CROSS JOIN LATERAL (
  SELECT priority, seq FROM jobs WHERE behind = asked.shape AND {STAYS} ORDER BY -priority, seq LIMIT 1
) AS head
""")
_STAYING: Final = text(f"""
SELECT behind, count(*), min(({TOP_PRIORITY} - priority) * {SUBMISSIONS} + seq) FROM jobs WHERE {STAYS} GROUP BY behind
""")
#: Read by the index of states, so that marked rows cost nothing.
_ACCEPTED_GROUPS: Final = text("""
SELECT shape, name, losses, priority, count(*), min(seq), max(seq) FROM jobs
WHERE state = 'accepted' AND revoked_at IS NULL GROUP BY shape, name, losses, priority
""")
_ACCEPTED_BETWEEN: Final = text("""
SELECT asked.number, count(*) FROM jobs
JOIN unnest(CAST(:numbers AS int[]), CAST(:shapes AS text[]), CAST(:names AS text[]), CAST(:losses AS int[]),
    CAST(:priorities AS int[]), CAST(:firsts AS bigint[]), CAST(:untils AS bigint[]))
  AS asked (number, shape, name, losses, priority, first, until)
  ON jobs.shape = asked.shape AND jobs.name = asked.name AND jobs.losses = asked.losses
    AND jobs.priority = asked.priority AND jobs.seq >= asked.first AND jobs.seq < asked.until
WHERE state = 'accepted' AND revoked_at IS NULL GROUP BY asked.number
""")
_STILL_ACCEPTED: Final = text(
    "SELECT id FROM jobs WHERE id = ANY(CAST(:ids AS text[])) AND state = 'accepted' AND revoked_at IS NULL"
)


def mark_behind(connection: Connection, shapes: Mapping[str, str], *, waiting: bool = False) -> Counter[str]:
    """Mark jobs as waiting in Postgres alone. `shapes`: the shape under which the ledger would file each job, by id.

    Return how many jobs of each shape were marked. Jobs that went on meanwhile, or whose rows somebody keeps locked,
    are left out. `waiting`: mark jobs that wait already, too. Only a caller that keeps all others from filing these
    jobs may do so.
    """
    values = {"ids": list(shapes), "shapes": list(shapes.values()), "waiting": waiting}
    return Counter(connection.execute(_MARK, values).scalars()) if shapes else Counter()


@dataclass(frozen=True, slots=True)
class Place:
    """A row without its message, as far as its place in the backlog goes."""

    id: str
    name: str
    shape: str
    priority: int
    seq: int
    losses: int


def unmarked(connection: Connection, most: int, after: tuple[int, int] = (-10, 0)) -> list[Place]:
    """Return jobs of which Postgres does not know yet whether the ledger took them, in the order of the backlog.

    `after`: a cursor (-priority, seq).
    """
    values = {"most": most, "priority": after[0], "seq": after[1]}
    return [Place(*row) for row in connection.execute(_UNMARKED, values)]


def fetch(connection: Connection, wanted: Mapping[str, tuple[int, int | None]]) -> dict[str, list[Pending]]:
    """Take the first jobs of shapes that stay in Postgres, to bring them to the ledger: they are `accepted` again.

    `wanted`: for each shape how many, and an order before which they are, None for any. Returns them in their order.
    """
    limits = [(TOP_PRIORITY + 1, 0) if before is None else divmod(before, SUBMISSIONS) for _, before in wanted.values()]
    values = {
        "shapes": list(wanted),
        "most": [most for most, _ in wanted.values()],
        "levels": [level - TOP_PRIORITY for level, _ in limits],
        "seqs": [seq for _, seq in limits],
    }
    now = time.time() * 1000
    fetched: dict[str, list[Pending]] = {}
    for row in connection.execute(_FETCH, values) if wanted else ():
        fetched.setdefault(row[10], []).append(_row(row, now))
    for rows in fetched.values():
        rows.sort(key=lambda row: (-row.priority, row.seq))
    return fetched


def next_orders(connection: Connection, shapes: Sequence[str]) -> dict[str, int]:
    """Return the order of the first job of each of these shapes that stays in Postgres, where one does."""
    rows = connection.execute(_NEXT, {"shapes": list(shapes)}) if shapes else ()
    return {row[0]: order(row[1], row[2]) for row in rows}


def staying(connection: Connection) -> list[tuple[str, int, int]]:
    """Return the shapes of jobs that stay in Postgres, with their number and the least order."""
    return [(row[0], row[1], row[2]) for row in connection.execute(_STAYING)]


@dataclass(frozen=True, slots=True)
class AcceptedGroup:
    """The accepted jobs of one shape, task, number of losses and priority: how many, and their first and last `seq`."""

    shape: str
    name: str
    losses: int
    priority: int
    number: int
    first: int
    last: int


def accepted_groups(connection: Connection) -> list[AcceptedGroup]:
    """Return the accepted jobs in groups. The cost grows with their number: none is accepted for long with a worker."""
    return [AcceptedGroup(*row) for row in connection.execute(_ACCEPTED_GROUPS)]


def accepted_between(connection: Connection, asked: Sequence[tuple[AcceptedGroup, int, int]]) -> list[int]:
    """Count the jobs of each of these groups from a `seq` on, before another one, in one statement."""
    values = {
        "numbers": list(range(len(asked))),
        "shapes": [group.shape for group, _, _ in asked],
        "names": [group.name for group, _, _ in asked],
        "losses": [group.losses for group, _, _ in asked],
        "priorities": [group.priority for group, _, _ in asked],
        "firsts": [first for _, first, _ in asked],
        "untils": [until for _, _, until in asked],
    }
    counts = {row[0]: int(row[1]) for row in connection.execute(_ACCEPTED_BETWEEN, values)} if asked else {}
    return [counts.get(number, 0) for number in range(len(asked))]


def still_accepted(connection: Connection, ids: Sequence[str]) -> frozenset[str]:
    """Return those of the named jobs whose rows are accepted."""
    return frozenset(connection.execute(_STILL_ACCEPTED, {"ids": list(ids)}).scalars()) if ids else frozenset()


_DROP: Final = text(f"""
UPDATE jobs SET state = :state, outbox = '{outbox.UNTOLD}', step = {Step.DROPPED.value}, finished_at = now(),
  error = coalesce(:error, error) WHERE id = :id AND (state IN ('accepted', 'scheduled', 'replaced')
  OR (state = 'waiting' AND (revoked_at IS NOT NULL OR behind IS NOT NULL
    OR EXISTS (SELECT 1 FROM authority WHERE authority = 'postgres'))))
  AND (CAST(:state AS text) <> 'failed' OR state IN ('accepted', 'waiting')) RETURNING id
""")


def end_unfiled(connection: Connection, job: str, state: State, error: str | None = None) -> bool:
    """End a job that is not in the ledger in a final state; return False where it is there or has ended.

    A waiting job is in the ledger, unless it stays behind, Postgres decides, or it was revoked while the ledger could
    not be asked. No rebuild brings such a revoked job in.
    """
    return connection.execute(_DROP, {"id": job, "state": state.value, "error": error}).first() is not None
