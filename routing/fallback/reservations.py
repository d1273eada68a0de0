"""Make the reservations of blocked jobs anew while Postgres decides.

The rules are `routing.policy.reservation`, as in `routing.recovery.reservations` for the ledger. The runner of the
duties reads the first waiting jobs, the live workers and what runs there, and writes one row for each reserved worker.
Workers keep to their rows when they pull. Expected ends come from the rows of the running jobs.

Each read is bounded or grows only with the running jobs. No read grows with the waiting jobs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.database import tenants
from celery_capacity.routing.fallback import reservation_rows
from celery_capacity.routing.fallback.reservation_rows import MAY_START, Row, Standing
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.request import Request, run_time_of
from celery_capacity.routing.policy.labels import named_worker
from celery_capacity.routing.policy.placement import CANDIDATES, MAX_ADMITTED, SHAPES, Book, Waiting, held_by
from celery_capacity.routing.policy.reservation import (
    Held,
    Patience,
    Reservation,
    Rules,
    is_taken,
    large_enough,
    place_in_line,
    planned,
    renew,
)
from celery_capacity.routing.policy.tenants import Sharing
from celery_capacity.routing.store import claims
from celery_capacity.routing.store.claims import Candidate, waiting_of

#: Waiting jobs in which a pass looks for blocked ones, from the first on: some 10 ms of Postgres.
MAX_LOOKED_AT: Final = 5000

_FIRSTS: Final = text(f"""
SELECT DISTINCT ON (shape, name) id, shape, priority, seq, losses, name FROM (
  (SELECT id, shape, priority, seq, losses, name FROM jobs
   WHERE state IN ('accepted', 'waiting') AND {MAY_START} ORDER BY -priority, seq LIMIT :most)
  UNION ALL
  (SELECT id, shape, priority, seq, losses, name FROM jobs
   WHERE state = 'scheduled' AND due_at <= now() AND {MAY_START} ORDER BY -priority, seq LIMIT :most)
) AS c ORDER BY shape, name, -priority, seq
""")
_OF_TENANT: Final = text(f"""
SELECT id, shape, priority, seq, losses, name FROM jobs
WHERE state IN ('accepted', 'waiting') AND {tenants.NAMES_TENANT} AND {tenants.OF_TENANT} = :tenant AND {MAY_START}
ORDER BY -priority, seq LIMIT :most
""")
# The workers with the most free CPUs are looked at, and before them those that are reserved or named already. Of two
# incarnations of a name the newer one counts.
_WORKERS: Final = text("""
WITH live AS (
  SELECT DISTINCT ON (name) name, incarnation, status, cpus, capacity, labels,
    (extract(epoch FROM ends_at - now()) * 1000)::bigint AS left_ms
  FROM workers WHERE status IN ('ready', 'draining') AND seen_at > now() - make_interval(secs => :seen_for)
  ORDER BY name, started_at DESC
), used AS (
  SELECT incarnation, sum(coalesce(substring(shape FROM '(?:^|,)cpus=([0-9]+)')::bigint, 0)) AS cpus
  FROM jobs WHERE state IN ('admitted', 'running') GROUP BY incarnation
)
SELECT live.name, live.incarnation, live.capacity, live.left_ms, live.labels
FROM live LEFT JOIN used ON used.incarnation = live.incarnation
WHERE live.status = 'ready' AND NOT EXISTS (SELECT FROM cordons c WHERE c.worker = live.name)
ORDER BY live.name <> ALL(CAST(:first AS text[])), live.cpus - coalesce(used.cpus, 0) DESC, live.name LIMIT :most
""")
_RUNNING: Final = text("""
SELECT worker, shape, losses, (extract(epoch FROM coalesce(started_at, admitted_at, now())) * 1000)::bigint
FROM jobs WHERE state IN ('admitted', 'running') AND incarnation = ANY(CAST(:incarnations AS text[])) ORDER BY seq
""")


@dataclass
class Memory:
    """Memory of a runner from one pass to the next, in one epoch.

    `refused`: pairs (incarnation, task) of a worker that can never hold a job of this task.
    """

    epoch: int = 0
    patience: Patience = field(default_factory=Patience)
    refused: set[tuple[str, str]] = field(default_factory=set)


class _TasksBut(Collection[str]):
    """All tasks but some. The rows of workers do not say which tasks they have registered."""

    def __init__(self, refused: Collection[str]) -> None:
        self._refused = refused

    def __contains__(self, task: object) -> bool:
        return task not in self._refused

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True)
class _Cluster:
    """Live workers by Postgres, the jobs on each, and the first waiting jobs by shape, in order."""

    books: Sequence[Book]
    held: Mapping[str, Sequence[Held]]
    firsts: Mapping[str, Waiting]
    sharing: Sharing | None


def renew_reservations(
    connection: Connection, rules: Rules, memory: Memory, worker_ttl: float, most_losses: int
) -> dict[str, int]:
    """Make the reservations anew, and wake the workers where some have room for others again.

    A worker counts that Postgres saw in the last `worker_ttl` seconds. A pass without a depth costs nothing: what a
    runner with a depth has left ends with its jobs. Counts: `reserved` workers, `overruns` of reserved times, workers
    `kept` from now on.
    """
    if not rules.depth or (state := reservation_rows.standing(connection, most_losses)) is None:
        return {}
    if memory.epoch != state.epoch:
        memory.epoch, memory.patience = state.epoch, Patience()
        memory.refused.clear()
    sharing = tenants.sharing_in_use(connection)
    firsts = _firsts(connection, most_losses, sharing)
    if not firsts and not state.rows:
        memory.patience.forget(())
        return {}
    cluster = _read(connection, firsts, sharing, state, memory, worker_ttl, most_losses)
    cluster = replace(cluster, firsts={shape: planned(it, cluster.books, sharing) for shape, it in firsts.items()})
    before = {
        row.worker: replace(row.reservation, shape=row.head.shape)
        for row in state.rows
        if row.reservation is not None and row.head is not None and not row.refused
    }
    heads = _heads(cluster, before, state.now, rules.depth)
    memory.patience.forget(firsts)
    renewed = renew(heads, cluster.books, cluster.held, state.now, rules, before, memory.patience, cluster.firsts)
    _write(connection, renewed.reservations, before, state, cluster.firsts)
    return {"reserved": len(renewed.reservations), "overruns": renewed.overruns, "kept": renewed.keepings}


def _firsts(connection: Connection, most_losses: int, sharing: Sharing | None) -> dict[str, Waiting]:
    """Return the first jobs of the first waiting shapes that no pause and no quota holds back, in order."""
    rows = [
        replace(waiting_of(Candidate(*columns), most_losses), task=name)
        for *columns, name in _first_rows(connection, sharing)
    ]
    rows.sort(key=lambda waiting: place_in_line(waiting.shape, waiting.order, sharing))
    firsts: dict[str, Waiting] = {}
    for waiting in rows:
        if len(firsts) < SHAPES and (sharing is None or sharing.may_start(waiting)):
            firsts.setdefault(waiting.shape, waiting)
    return firsts


def _first_rows(connection: Connection, sharing: Sharing | None) -> Iterator[Any]:
    """Yield the first jobs of the first shapes, and of each tenant where tenants are in use."""
    yield from connection.execute(_FIRSTS, {"most": MAX_LOOKED_AT})
    if sharing is not None:
        for tenant in tenants.waiting_tenants(connection)[1:]:
            yield from connection.execute(_OF_TENANT, {"most": MAX_ADMITTED, "tenant": tenant})


def _read(
    connection: Connection,
    firsts: Mapping[str, Waiting],
    sharing: Sharing | None,
    state: Standing,
    memory: Memory,
    worker_ttl: float,
    most_losses: int,
) -> _Cluster:
    named = [name for waiting in firsts.values() if (name := named_worker(waiting.terms))]
    first = list(dict.fromkeys([*(row.worker for row in state.rows), *named]))
    values: dict[str, Any] = {"seen_for": worker_ttl, "first": first, "most": CANDIDATES + len(first)}
    rows = connection.execute(_WORKERS, values).all()
    incarnations = {row.name: row.incarnation for row in rows}
    for row in state.rows:
        if row.refused and row.head is not None and row.worker in incarnations:
            memory.refused.add((incarnations[row.worker], row.head.task))
    held: dict[str, list[Held]] = {}
    running = connection.execute(_RUNNING, {"incarnations": list(incarnations.values())}).all() if rows else []
    for worker, shape, losses, since in running:
        request = held_by(Request.from_shape(shape), losses, most_losses)
        held.setdefault(worker, []).append(Held(request, since, run_time_of(shape).expected))
    books = []
    for name, incarnation, capacity, left, labels in rows:
        refused = {task for refuser, task in memory.refused if refuser == incarnation}
        tasks = _TasksBut(refused) if refused else None
        book = Book(name, amounts.from_people(capacity), {}, tasks=tasks, left=left, labels=labels)
        for job in held.get(name, ()):
            book = book.holding(job.request)
        books.append(book)
    return _Cluster(books, held, firsts, sharing)


def _heads(cluster: _Cluster, before: Mapping[str, Reservation], now: int, depth: int) -> list[Waiting]:
    """Return the first blocked jobs by shape, in order, as many as the depth says.

    No worker is kept for a job that must be alone, so that it is no head either.
    """
    # A worker that is reserved for a job which waits no more, or is paused, is free for others by this pass.
    reserved = {worker: entry for worker, entry in before.items() if entry.shape in cluster.firsts}
    heads: list[Waiting] = []
    for waiting in cluster.firsts.values():
        if len(heads) >= depth:
            break
        able = [] if waiting.request.get(ALONE) else large_enough(waiting, cluster.books)
        if able and not any(is_taken(waiting, book, reserved.get(book.worker), now, cluster.sharing) for book in able):
            heads.append(waiting)
    return heads


def _write(
    connection: Connection,
    made: Mapping[str, Reservation],
    before: Mapping[str, Reservation],
    state: Standing,
    firsts: Mapping[str, Waiting],
) -> None:
    """Write what changed, and wake the workers if a reservation moved or is over."""
    rows: dict[str, Row] = {row.worker: row for row in state.rows}
    gone = [row for worker, row in rows.items() if worker not in made]
    if gone:
        reservation_rows.remove(connection, gone)
    changed = [entry for worker, entry in made.items() if entry != before.get(worker)]
    for entry in changed:
        job = firsts[entry.shape].job
        reservation_rows.put(connection, entry, job, state.epoch, rows.get(entry.worker))
    if gone or any(entry.worker in before for entry in changed):
        claims.wake(connection)
