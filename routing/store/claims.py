"""Take jobs from Postgres where it decides: the pulls of a worker while the ledger is gone, and the ends of attempts.

A worker reads the backlog in its order, chooses the jobs that fit beside those it holds, and takes them in one
statement. The WHERE of that statement is the admission: Postgres decides, in this epoch, and the row still waits. Two
workers that chose one job do not both get it: each skips the rows that the other has locked. `job_transitions.apply`
writes the ends, guarded by their token.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database import tenants
from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.database.schema import CHANNEL
from celery_capacity.routing.insert.columns import held_columns
from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.message import Tag, tagged
from celery_capacity.routing.model.request import KNOWN_EVERYWHERE, Request, holding, number_held, run_time_of, terms_of
from celery_capacity.routing.model.states import Outcome, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.ends import became
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import MAX_ADMITTED, Book, Waiting, held_by, order
from celery_capacity.routing.policy.reservation import Reservation, first_fitting
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, Sharing
from celery_capacity.routing.policy.unknown_starts import FEWEST_LOSSES, losses_in_doubt
from celery_capacity.routing.store import fencing, job_transitions
from celery_capacity.routing.store.controls import NOT_PAUSED
from celery_capacity.routing.store.job_transitions import Applied, Transition

#: Rows that one statement reads.
PAGE: Final = 200
#: Cursor before the first row of the backlog: (-priority, seq).
START: Final = (-10, 0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that waits and may start now. `held`: its shape once it holds the chosen alternative, "" for no change."""

    job: str
    shape: str
    priority: int
    seq: int
    losses: int
    held: str = ""

    @property
    def position(self) -> tuple[int, int]:
        """Return the position in the backlog: the cursor of the page after this row."""
        return -self.priority, self.seq


@dataclass(frozen=True, slots=True)
class Taken:
    """An attempt that this worker holds from now on.

    `message` carries the tag of the attempt. Times in milliseconds of Postgres's clock; submitted, or due later.
    """

    job: str
    name: str
    token: Token
    shape: str
    losses: int
    started_ms: int
    message: str
    #: False: the first lost attempt ends the job.
    rerun: bool = True
    submitted_ms: int = 0


# Two selections in order, each by its own index: waiting jobs, and due jobs. Shapes that do not fit are left out here,
# so that ten thousand such jobs in front cost an index scan and no round trip.
_SELECT: Final = """
(SELECT id, shape, priority, seq, losses FROM jobs
 WHERE {} AND (expires_at IS NULL OR expires_at > now()) AND revoked_at IS NULL AND (-priority, seq) > (:priority, :seq)
   AND shape <> ALL(CAST(:without AS text[])) AND {}
   AND (CAST(:tasks AS text[]) IS NULL OR name = ANY(CAST(:tasks AS text[]))
     OR name LIKE ANY(CAST(:everywhere AS text[])))
   AND (CAST(:left AS bigint) IS NULL OR {} <= CAST(:left AS bigint))
 ORDER BY -priority, seq LIMIT :most)
"""
#: Milliseconds by which a job has ended, 0 for unknown, as `run_time_of` reads them from its shape.
_BOUND: Final = (
    r"coalesce(substring(shape FROM ',\^([0-9]+),~[0-9]+$'), substring(shape FROM ',~([0-9]+)$'), '0')::bigint"
)
_WAITS: Final = "state IN ('accepted', 'waiting')"
_IS_DUE: Final = "state = 'scheduled' AND due_at <= now()"
_CANDIDATES: Final = text(
    f"SELECT * FROM ({_SELECT.format(_WAITS, NOT_PAUSED, _BOUND)}"
    f" UNION ALL {_SELECT.format(_IS_DUE, NOT_PAUSED, _BOUND)}) AS c"
    " ORDER BY -priority, seq LIMIT :most"
)
#: Selections of the first jobs of one tenant that wait, by the index of tenants, and of the default tenant.
_OF_TENANT: Final = text(_SELECT.format(f"{_WAITS} AND {tenants.OF_TENANT} = :tenant", NOT_PAUSED, _BOUND))
_OF_DEFAULT: Final = text(_SELECT.format(f"{_WAITS} AND NOT ({tenants.NAMES_TENANT})", NOT_PAUSED, _BOUND))


def candidates(
    connection: Connection,
    most: int,
    after: tuple[int, int] = START,
    without: Sequence[str] = (),
    tasks: Collection[str] | None = None,
    left: int | None = None,
    tenant: str | None = None,
) -> list[Candidate]:
    """Return jobs that may start now, in the order of the backlog after a cursor, without these shapes.

    `tenant`: only waiting jobs of this one. `tasks`: names of the tasks that the worker has registered, None where it
    takes any. `left`: milliseconds until the worker ends, None where no end is known.
    """
    values = {
        "most": most,
        "priority": after[0],
        "seq": after[1],
        "without": list(without),
        "tasks": None if tasks is None else sorted(tasks),
        "left": left,
        "everywhere": [f"{beginning}%" for beginning in KNOWN_EVERYWHERE],
    }
    statement = _CANDIDATES if tenant is None else _OF_DEFAULT if tenant == DEFAULT_TENANT else _OF_TENANT
    return [Candidate(*row) for row in connection.execute(statement, {**values, "tenant": tenant})]


def choose(
    book: Book,
    page: Sequence[Candidate],
    most_losses: int,
    sharing: Sharing | None = None,
    reservation: Reservation | None = None,
    now: int = 0,
) -> list[Candidate]:
    """Return the jobs of a page that this worker takes, in order, beside its reservation.

    A worker that holds nothing takes a job that must be alone before all others. No worker is kept for such a job,
    while the ledger keeps one: here every worker would be kept, since none knows of the others.
    """
    by_id = {row.job: row for row in page}
    waiting, alone = [waiting_of(row, most_losses) for row in page], None
    if book.empty:
        exclusive = (entry for entry in waiting if entry.request.get(ALONE) and book.takes(entry))
        alone = next(filter(None, (first_fitting(it, book, reservation, now, sharing) for it in exclusive)), None)
    if alone is not None:
        starting = [alone]
    else:
        elsewhere = {entry.shape for entry in waiting if entry.request.get(ALONE)}
        starting = fill_or_keep(book, waiting, MAX_ADMITTED, elsewhere, reservation, now, sharing).admitted
    return [replace(by_id[it.job], held=it.held_shape if len(it.alternatives) > 1 else "") for it in starting]


def look(
    connection: Connection,
    book: Book,
    most_losses: int,
    passed: Collection[str] = (),
    reservation: Reservation | None = None,
    now: int = 0,
) -> list[Candidate]:
    """Return the first jobs of the backlog that this worker takes, without those `passed`; empty where nothing fits.

    The backlog is read page by page. A shape that did not fit, that a quota holds back, or that may not pass the
    worker's reservation at this time (ms), is left out of all later pages. Where tenants are in use, the first jobs of
    each are looked at together before.
    """
    after, without = START, set[str]()
    sharing = tenants.sharing_in_use(connection)
    if sharing is not None:
        firsts: list[Candidate] = []
        for tenant in tenants.waiting_tenants(connection):
            firsts += candidates(connection, MAX_ADMITTED, START, (), book.tasks, book.left, tenant)
        page = [row for row in firsts if row.job not in passed]
        chosen = choose(book, page, most_losses, sharing, reservation, now)
        if chosen:
            return chosen
    while True:
        page = candidates(connection, PAGE, after, sorted(without), book.tasks, book.left)
        possible = [row for row in page if row.job not in passed]
        chosen = choose(book, possible, most_losses, sharing, reservation, now)
        if chosen or len(page) < PAGE:
            return chosen
        after = page[-1].position
        last = order(page[-1].priority, page[-1].seq)
        for shape, row in {row.shape: row for row in page}.items():
            waiting = replace(waiting_of(row, 0), order=last)
            if not book.takes(waiting) or first_fitting(waiting, book, reservation, now, sharing) is None:
                without.add(shape)


def waiting_of(row: Candidate, most_losses: int) -> Waiting:
    """Return a row in the form that the policy takes. Its task was compared by the statement that read it."""
    request = held_by(Request.from_shape(row.held or row.shape), row.losses, most_losses)
    return Waiting(row.job, request, order(row.priority, row.seq), "", run_time_of(row.shape), terms_of(row.shape))


@dataclass(frozen=True, slots=True)
class Passing:
    """Room beside the head that a reserved worker has left once it took some jobs.

    `made_at` identifies the reservation by which the jobs were chosen.
    """

    made_at: datetime
    beside: Mapping[str, int]


_TAKE: Final = f"""
WITH {{}} doubt AS (
  -- A worker that never said that it lost the ledger, with all that it had claimed there, and is silent since: what had
  -- been submitted by then may have started on it (`routing.policy.unknown_starts`).
  SELECT a.changed_at FROM authority a WHERE EXISTS (
    SELECT 1 FROM workers w WHERE w.seen_at < a.changed_at AND w.ledger_lost_at IS NULL
      AND (w.status IN ('ready', 'draining') OR (w.status = 'lost' AND w.left_at > a.changed_at)))
), chosen AS (
  -- (Admitted and started at one moment: the clock is read once for both.)
  SELECT id, clock_timestamp() AS at,
    epoch < :epoch AND submitted_at < coalesce((SELECT changed_at FROM doubt), '-infinity') AS doubtful
  FROM jobs
  WHERE id = ANY(CAST(:ids AS text[]))
    AND (({_WAITS}) OR ({_IS_DUE}))
    AND (expires_at IS NULL OR expires_at > now())
    AND revoked_at IS NULL
    AND EXISTS (SELECT 1 FROM authority WHERE authority = 'postgres' AND epoch = :epoch)
    AND {NOT_PAUSED} AND NOT EXISTS (SELECT FROM cordons WHERE worker = :worker) {{}}
    AND coalesce(CAST(:held AS jsonb) -> id ->> 'waiting', shape) = shape
  FOR NO KEY UPDATE SKIP LOCKED
), taken AS (
  UPDATE jobs SET state = 'running', epoch = :epoch, attempt = jobs.attempt + 1 + chosen.doubtful::int,
    step = {Step.RUNNING.value},
    losses = jobs.losses + (chosen.doubtful AND jobs.rerun AND jobs.losses = 0 AND :counts)::int,
    worker = :worker, incarnation = :incarnation, admitted_at = chosen.at, started_at = chosen.at,
    error = NULL, shape = coalesce(CAST(:held AS jsonb) -> jobs.id ->> 'shape', jobs.shape),
    request = coalesce((CAST(:held AS jsonb) -> jobs.id ->> 'request')::jsonb, jobs.request)
  FROM chosen WHERE jobs.id = chosen.id
  RETURNING jobs.id, jobs.name, jobs.attempt, jobs.shape, jobs.priority, jobs.seq, jobs.losses, jobs.message,
    jobs.started_at, jobs.rerun, greatest(jobs.submitted_at, jobs.due_at) AS came
), a AS (
  INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, admitted_at, started_at)
  SELECT id, :epoch, attempt, :worker, :incarnation, started_at, started_at FROM taken
  ON CONFLICT DO NOTHING
)
SELECT id, name, attempt, shape, losses, (extract(epoch FROM started_at) * 1000)::bigint, message, rerun,
  (extract(epoch FROM came) * 1000)::bigint
FROM taken ORDER BY -priority, seq
"""
#: Statements that take jobs: on a worker without a reservation, and on a reserved one.
_TAKE_ANY: Final = text(_TAKE.format("", ""))
_TAKE_BESIDE: Final = text(
    _TAKE.format(
        """passing AS (
  -- The runner of the duties may have replaced the reservation meanwhile: then nothing is taken.
  UPDATE reservations SET beside = CAST(:beside AS jsonb)
  WHERE worker = :worker AND epoch = :epoch AND made_at = :made_at RETURNING worker
),""",
        "AND EXISTS (SELECT FROM passing)",
    )
)


def take(
    connection: Connection,
    epoch: int,
    worker: str,
    incarnation: str,
    jobs: Sequence[str],
    most_losses: int = FEWEST_LOSSES,
    passing: Passing | None = None,
    held: Mapping[str, str] | None = None,
) -> list[Taken]:
    """Make attempts of these jobs where they still wait; none where Postgres does not decide in this epoch.

    `passing`: of a reserved worker. Nothing is taken where the reservation is another one by now. `held`: the shapes of
    those that hold an alternative from now on, by job.
    """
    columns = {job: held_columns(shape) for job, shape in (held or {}).items()}
    changes = json.dumps({job: {**new, "waiting": holding(new["shape"], 0)} for job, new in columns.items()})
    values: dict[str, Any] = {"ids": list(jobs), "epoch": epoch, "worker": worker, "incarnation": incarnation}
    values |= {"counts": most_losses >= FEWEST_LOSSES, "held": changes}
    if passing is not None:
        values |= {"made_at": passing.made_at, "beside": json.dumps(dict(passing.beside))}
    rows = connection.execute(_TAKE_ANY if passing is None else _TAKE_BESIDE, values)
    taken = []
    for job, name, attempt, shape, losses, started_ms, message, *facts in rows:
        tag = Tag(job, token := Token(epoch, attempt), number_held(shape))
        taken.append(Taken(job, name, token, shape, losses, started_ms, tagged(bytes(message), tag), *facts))
    return taken


def wake(connection: Connection) -> None:
    """Notify the workers that pull that there are jobs to take."""
    connection.execute(text(f"NOTIFY {CHANNEL}"))


# -- how attempts end


@dataclass(frozen=True, slots=True)
class OpenAttempt:
    """An attempt that is on a worker, by its row. Times in milliseconds, 0 means none."""

    job: str
    token: Token
    worker: str
    incarnation: str
    losses: int
    rerun: bool
    admitted_ms: int
    started_ms: int


_OPEN: Final = """
SELECT id, epoch, attempt, coalesce(worker, ''), coalesce(incarnation, ''), losses, rerun,
  coalesce((extract(epoch FROM admitted_at) * 1000)::bigint, 0),
  coalesce((extract(epoch FROM started_at) * 1000)::bigint, 0)
FROM jobs WHERE state IN ('admitted', 'running') AND {} ORDER BY id
"""
_OPEN_ON_INCARNATION: Final = text(_OPEN.format("incarnation = :incarnation"))
_OPEN_ON_NOBODY: Final = text(_OPEN.format(fencing.OF_NOBODY))


def open_attempts(connection: Connection, incarnation: str) -> list[OpenAttempt]:
    """Return the attempts that an incarnation of a worker holds, by Postgres."""
    return _opened(connection.execute(_OPEN_ON_INCARNATION, {"incarnation": incarnation}))


def orphans(connection: Connection) -> list[OpenAttempt]:
    """Return the attempts that Postgres has on incarnations of workers that have ended."""
    return _opened(connection.execute(_OPEN_ON_NOBODY))


def _opened(rows: Iterable[Any]) -> list[OpenAttempt]:
    return [OpenAttempt(job, Token(epoch, attempt), *rest) for job, epoch, attempt, *rest in rows]


def give_back(
    connection: Connection, attempts: Sequence[OpenAttempt], outcome: Outcome | None, error: str, most_losses: int
) -> list[Applied]:
    """End open attempts that nobody holds any more; return the rows that changed.

    `outcome`: taken_back or lost. None: lost if the attempt had started, else taken_back.
    """
    if not attempts:
        return []
    now = now_ms(connection)
    transitions = []
    for attempt in attempts:
        ends_as = outcome or (Outcome.LOST if attempt.started_ms else Outcome.TAKEN_BACK)
        losses = attempt.losses
        if outcome is None and not attempt.started_ms:
            # Nobody knows if the job was claimed before its worker was gone.
            losses = losses_in_doubt(losses, most_losses, attempt.rerun)
        after = became(ends_as, losses, most_losses, attempt.rerun)
        transitions.append(
            Transition(
                job=attempt.job,
                token=attempt.token,
                state=after.state,
                step=after.step,
                worker=attempt.worker,
                incarnation=attempt.incarnation,
                admitted_ms=attempt.admitted_ms,
                started_ms=attempt.started_ms,
                at_ms=now,
                losses=after.losses,
                outcome=ends_as,
                error=error,
            )
        )
    return job_transitions.apply(connection, transitions)


def give_back_free(
    connection: Connection, attempts: Sequence[OpenAttempt], outcome: Outcome | None, error: str, most_losses: int
) -> list[Applied]:
    """End open attempts as `give_back` does, in the caller's transaction, without the jobs whose rows are locked.

    A later pass ends these.
    """
    try:
        with connection.begin_nested():
            return give_back(connection, attempts, outcome, error, most_losses)
    except OperationalError as problem:
        if not is_locked(problem):
            raise
    free = job_transitions.free(connection, [attempt.job for attempt in attempts])
    return give_back(connection, [attempt for attempt in attempts if attempt.job in free], outcome, error, most_losses)


def now_ms(connection: Connection) -> int:
    """Return Postgres's clock, in milliseconds."""
    return int(connection.execute(text("SELECT extract(epoch FROM clock_timestamp()) * 1000")).scalar_one())
