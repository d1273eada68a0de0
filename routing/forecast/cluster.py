"""Copy of the cluster for a forecast, from Postgres: live workers, running jobs, and the first jobs of the backlog.

Both authorities have these rows. They are behind the ledger by the few milliseconds of a batch. All reads should be in
one transaction at the level REPEATABLE READ, so that no job is seen twice. The reads are bounded, and each goes by an
index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.database import tenants
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.expected import CLASSES
from celery_capacity.routing.model.request import Request, filed_shape, run_time_of, split_shape, split_suffix, terms_of
from celery_capacity.routing.model.states import WorkerStatus
from celery_capacity.routing.policy.learned_times import Kind
from celery_capacity.routing.policy.placement import Book, Waiting, held_by, order
from celery_capacity.routing.policy.reservation import Held
from celery_capacity.routing.simulation.forecast import MAX_JOBS, Cluster, running_until
from celery_capacity.routing.simulation.jobs import Queued, Running
from celery_capacity.routing.simulation.shares import Shares
from celery_capacity.routing.store import run_times
from celery_capacity.routing.store.controls import NOT_PAUSED

#: Workers of a forecast, and running jobs. A larger cluster gets no forecast.
MAX_WORKERS: Final = 5000
MAX_RUNNING: Final = 20_000
#: Tenants of a forecast that have waiting jobs.
MAX_TENANTS: Final = 1000
#: Waiting jobs that are counted behind those of a forecast.
MAX_COUNTED: Final = 1_000_000
#: Position behind the whole backlog: (-priority, seq).
ALL: Final = (1, 0)

_LEARNED: Final = frozenset(CLASSES)

_WORKERS: Final = text("""
SELECT name, capacity, status = :ready AND NOT EXISTS (SELECT FROM cordons c WHERE c.worker = workers.name),
  (extract(epoch FROM ends_at - now()) * 1000)::bigint, labels
FROM workers WHERE status IN ('ready', 'draining') AND seen_at > now() - make_interval(secs => :seen_for)
ORDER BY name LIMIT :most
""")
_RUNNING: Final = text("""
SELECT id, worker, name, shape, losses, expected_ms,
  (extract(epoch FROM coalesce(started_at, admitted_at, now())) * 1000)::bigint AS since
FROM jobs WHERE state IN ('admitted', 'running') AND worker IS NOT NULL ORDER BY seq LIMIT :most
""")
_WAITS: Final = f"""state IN ('accepted', 'waiting') AND (expires_at IS NULL OR expires_at > now())
  AND revoked_at IS NULL AND {NOT_PAUSED}"""
_WAITING: Final = text(f"""
SELECT id, name, shape, priority, seq, losses, expected_ms FROM jobs
WHERE {_WAITS} AND (-priority, seq) <= (:priority, :seq) ORDER BY -priority, seq LIMIT :most
""")
_BEYOND: Final = text(f"""
SELECT count(*) FROM (SELECT FROM jobs
WHERE {_WAITS} AND (-priority, seq) > (:after_priority, :after_seq) AND (-priority, seq) <= (:priority, :seq)
LIMIT :most) AS b
""")
_ROW: Final = "id, name, shape, priority, seq, losses, expected_ms"
_WAITING_OF_TENANTS: Final = text(f"""
SELECT w.* FROM unnest(CAST(:tenants AS text[])) AS t (tenant) CROSS JOIN LATERAL (
  SELECT {_ROW} FROM jobs WHERE {_WAITS} AND {tenants.NAMES_TENANT} AND {tenants.OF_TENANT} = t.tenant
  ORDER BY -priority, seq LIMIT :most) AS w
""")
_WAITING_OF_DEFAULT: Final = text(f"""
SELECT * FROM (SELECT {_ROW} FROM jobs WHERE {_WAITS} ORDER BY -priority, seq LIMIT :looked_at) AS w
WHERE NOT ({tenants.NAMES_TENANT}) ORDER BY -priority, seq LIMIT :most
""")
_ALL_WAITING: Final = text(f"SELECT count(*) FROM (SELECT FROM jobs WHERE {_WAITS} LIMIT :most) AS w")
_NOW: Final = text("SELECT (extract(epoch FROM now()) * 1000)::bigint")


class TooLarge(Exception):
    """The cluster has more workers, running jobs or tenants than a forecast takes."""


def live_books(connection: Connection, worker_ttl: float) -> list[Book]:
    """Return the empty books of the live workers. They take any task. Raises `TooLarge`."""
    values = {"ready": WorkerStatus.READY, "seen_for": worker_ttl, "most": MAX_WORKERS + 1}
    rows = connection.execute(_WORKERS, values).all()
    return [
        Book(name, amounts.from_people(capacity), {}, admitting=admits, left=left, labels=labels)
        for name, capacity, admits, left, labels in rows
    ]


def read_cluster(
    connection: Connection,
    books: Iterable[Book],
    most_losses: int,
    last: tuple[int, int] = ALL,
    most: int = MAX_JOBS,
    shares: Shares | None = None,
) -> Cluster:
    """Return the cluster with these workers, as Postgres has its jobs. Raises `TooLarge`.

    `last`: the position (-priority, seq) of the last waiting job that is read. `most`: waiting jobs. Paused
    jobs are left out. `shares`: of tenants in use; then the first jobs of each tenant are read, whatever is the last.
    """
    empty = {book.worker: replace(book, allocated={}, kept="", reserved_at=None) for book in books}
    now = int(connection.execute(_NOW).scalar_one())
    running = connection.execute(_RUNNING, {"most": MAX_RUNNING + 1}).all()
    if len(running) > MAX_RUNNING or len(empty) > MAX_WORKERS:
        raise TooLarge
    if shares is None:
        waiting, beyond = _read_backlog(connection, last, most)
    else:
        waiting, beyond = _read_backlog_of_tenants(connection, most)
    means = run_times.means(connection, (_kind(row) for row in (*running, *waiting)))
    held = [_running(row, most_losses, means, now) for row in running if row.worker in empty]
    for entry in held:
        empty[entry.worker] = empty[entry.worker].holding(entry.held.request)
    jobs = {entry.job for entry in held}
    queued = _queued([row for row in waiting if row.id not in jobs], most_losses, means)
    return Cluster(now, empty, held, queued, beyond, shares=shares)


def _read_backlog(connection: Connection, last: tuple[int, int], most: int) -> tuple[Sequence[Any], int]:
    """Return the first waiting jobs up to a position, and the number of those between them and the position."""
    span = {"priority": last[0], "seq": last[1]}
    waiting = connection.execute(_WAITING, {**span, "most": most}).all()
    if len(waiting) < most or (end := (-waiting[-1].priority, waiting[-1].seq)) == last:
        return waiting, 0
    after = {"after_priority": end[0], "after_seq": end[1], "most": MAX_COUNTED}
    return waiting, int(connection.execute(_BEYOND, {**span, **after}).scalar_one())


def _read_backlog_of_tenants(connection: Connection, most: int) -> tuple[Sequence[Any], int]:
    """Return the first waiting jobs of each tenant in order, as many of each, and the number of all others."""
    names = tenants.waiting_tenants(connection)
    if len(names) > MAX_TENANTS:
        raise TooLarge
    each = max(1, most // len(names))
    rows = list(connection.execute(_WAITING_OF_TENANTS, {"tenants": names[1:], "most": each}))
    rows += connection.execute(_WAITING_OF_DEFAULT, {"looked_at": MAX_RUNNING, "most": each}).all()
    waiting = sorted(rows, key=lambda row: (-row.priority, row.seq))
    return waiting, int(connection.execute(_ALL_WAITING, {"most": MAX_COUNTED}).scalar_one()) - len(waiting)


def likely_run(expected_ms: int, shape: str, mean: int) -> int:
    """Return the milliseconds that a job is likely to run, 0 where nobody knows.

    `expected_ms`: as its row has it. `mean`: of the jobs of its task and request that ended, 0 for unknown. A learned
    time is the end of a class, and four of five jobs end within it: the mean is likelier.
    """
    expected = expected_ms or run_time_of(shape).expected
    return mean if mean and (not expected or expected_ms in _LEARNED) else expected


def _kind(row: Any) -> Kind:
    return row.name, split_suffix(row.shape)[0]


def _running(row: Any, most_losses: int, means: Mapping[Kind, int], now: int) -> Running:
    request = held_by(Request.from_shape(row.shape), row.losses, most_losses)
    held = Held(request, min(row.since, now), run_time_of(row.shape).expected)
    likely = likely_run(row.expected_ms, row.shape, means.get(_kind(row), 0))
    return running_until(row.id, row.worker, held, likely, now, terms_of(row.shape))


def _queued(rows: Sequence[Any], most_losses: int, means: Mapping[Kind, int]) -> list[Queued]:
    queued = []
    for row in rows:
        request = held_by(Request.from_shape(row.shape), row.losses, most_losses)
        task = split_shape(filed_shape(row.shape, row.name)).task
        position = order(row.priority, row.seq)
        waiting = Waiting(row.id, request, position, task, run_time_of(row.shape), terms_of(row.shape))
        queued.append(Queued(waiting, likely_run(row.expected_ms, row.shape, means.get(_kind(row), 0))))
    return queued
