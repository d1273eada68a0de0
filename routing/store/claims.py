"""Taking jobs from Postgres, where it decides: what a worker pulls while the ledger is gone, and how its attempts end.

A worker looks at the backlog in its order, chooses what fits beside what it holds, and takes that in one statement
whose WHERE is the admission: Postgres decides, in this epoch, and the row still waits. Two workers that chose the same
job share nothing: the one skips what the other has locked. Ends are written by `store.apply`, guarded by their token.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database.postgres import is_locked
from celery_capacity.routing.database.schema import CHANNEL
from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import FINAL, State, Step
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import MOST_ADMITTED, Book, Waiting, fits, held_by, order
from celery_capacity.routing.policy.unknown_starts import FEWEST_LOSSES, losses_in_doubt
from celery_capacity.routing.store import fencing, job_transitions
from celery_capacity.routing.store.job_transitions import Applied, Transition

#: Rows looked at in one statement.
PAGE: Final = 200
#: Before the first row of the backlog: (-priority, seq).
START: Final = (-10, 0)
#: (epoch, attempt, step) of a row.
Rank = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that waits, and may start now."""

    job: str
    shape: str
    priority: int
    seq: int
    losses: int

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in the backlog: the cursor of the page after it."""
        return -self.priority, self.seq


@dataclass(frozen=True, slots=True)
class Taken:
    """An attempt that this worker holds from now on. `message` with the tag of the attempt; times in milliseconds of
    Postgres's clock."""

    job: str
    token: str
    shape: str
    losses: int
    started_ms: int
    message: str
    #: False: its first lost attempt ends it.
    rerun: bool = True


# Two ordered parts, each by its own index: what waits, and what is due. Shapes that do not fit are left out here, so
# that ten thousand of them in front cost an index scan and no round trip.
_PART: Final = """
(SELECT id, shape, priority, seq, losses FROM jobs
 WHERE {} AND (expires_at IS NULL OR expires_at > now()) AND revoked_at IS NULL AND (-priority, seq) > (:priority, :seq)
   AND shape <> ALL(CAST(:without AS text[]))
 ORDER BY -priority, seq LIMIT :most)
"""
_WAITS: Final = "state IN ('accepted', 'waiting')"
_IS_DUE: Final = "state = 'scheduled' AND due_at <= now()"
_CANDIDATES: Final = text(
    f"SELECT * FROM ({_PART.format(_WAITS)} UNION ALL {_PART.format(_IS_DUE)}) AS c ORDER BY -priority, seq LIMIT :most"
)


def candidates(
    connection: Connection, most: int, after: tuple[int, int] = START, without: Sequence[str] = ()
) -> list[Candidate]:
    """What waits and may start now, in the order of the backlog after a cursor, but for these shapes."""
    values = {"most": most, "priority": after[0], "seq": after[1], "without": list(without)}
    return [Candidate(*row) for row in connection.execute(_CANDIDATES, values)]


def choose(book: Book, page: Sequence[Candidate], most_losses: int) -> list[Candidate]:
    """What of a page this worker takes, in order. A job that must be alone is taken by whoever holds nothing, before
    all others. (No worker is kept for it, as the ledger does: each would be, since none knows of the others.)"""
    asked = {one.job: held_by(Request.from_shape(one.shape), one.losses, most_losses) for one in page}
    alone = [one for one in page if asked[one.job].get(ALONE)]
    if book.empty:
        for one in alone:
            if fits(asked[one.job], book) is None:
                return [one]
    known = {one.job: one for one in page}
    waiting = [Waiting(one.job, asked[one.job], order(one.priority, one.seq)) for one in page]
    elsewhere = {asked[one.job].shape for one in alone}
    return [known[one.job] for one in fill_or_keep(book, waiting, len(page), MOST_ADMITTED, elsewhere).admitted]


def look(connection: Connection, book: Book, most_losses: int, passed: Collection[str] = ()) -> list[Candidate]:
    """The first jobs of the backlog that this worker takes, but for those `passed`; empty where nothing fits. Page by
    page, without the shapes that were seen not to fit."""
    after, without = START, set[str]()
    while True:
        page = candidates(connection, PAGE, after, sorted(without))
        chosen = choose(book, [one for one in page if one.job not in passed], most_losses)
        if chosen or len(page) < PAGE:
            return chosen
        after = page[-1].place
        without |= {one.shape for one in page if fits(Request.from_shape(one.shape), book) is not None}


_TAKE: Final = text(f"""
WITH doubt AS (
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
  FOR NO KEY UPDATE SKIP LOCKED
), taken AS (
  UPDATE jobs SET state = 'running', epoch = :epoch, attempt = jobs.attempt + 1 + chosen.doubtful::int,
    step = {Step.RUNNING.value},
    losses = jobs.losses + (chosen.doubtful AND jobs.rerun AND jobs.losses = 0 AND :counts)::int,
    worker = :worker, incarnation = :incarnation, admitted_at = chosen.at, started_at = chosen.at,
    error = NULL
  FROM chosen WHERE jobs.id = chosen.id
  RETURNING jobs.id, jobs.attempt, jobs.shape, jobs.priority, jobs.seq, jobs.losses, jobs.message, jobs.started_at,
    jobs.rerun
), a AS (
  INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, admitted_at, started_at)
  SELECT id, :epoch, attempt, :worker, :incarnation, started_at, started_at FROM taken
  ON CONFLICT DO NOTHING
)
SELECT id, attempt, shape, losses, (extract(epoch FROM started_at) * 1000)::bigint, message, rerun
FROM taken ORDER BY -priority, seq
""")


def take(
    connection: Connection,
    epoch: int,
    worker: str,
    incarnation: str,
    jobs: Sequence[str],
    most_losses: int = FEWEST_LOSSES,
) -> list[Taken]:
    """Make attempts of these jobs, those of them that still wait; none where Postgres does not decide in this epoch."""
    values = {"ids": list(jobs), "epoch": epoch, "worker": worker, "incarnation": incarnation}
    rows = connection.execute(_TAKE, {**values, "counts": most_losses >= FEWEST_LOSSES})
    taken = []
    for job, attempt, shape, losses, started_ms, message, rerun in rows:
        token = f"{epoch}.{attempt}"
        taken.append(Taken(job, token, shape, losses, started_ms, tagged(bytes(message), job, token), rerun))
    return taken


def tagged(message: bytes, job: str, token: str) -> str:
    """A row's message with the token of its attempt as delivery tag, as `tagged` in lua/lib/transitions.lua makes
    it."""
    return f'{message[:-2].decode("utf-8")},"delivery_tag":{json.dumps(f"{job}:{token}")}}}}}'


def wake(connection: Connection) -> None:
    """Tell the workers that pull that there is something to take."""
    connection.execute(text(f"NOTIFY {CHANNEL}"))


# -- how attempts end


@dataclass(frozen=True, slots=True)
class Became:
    """What the end of an attempt makes of its job (where Postgres holds a successor, the job goes on with that)."""

    state: State
    step: Step
    losses: int


def became(outcome: str, losses: int, most_losses: int, rerun: bool) -> Became:
    """`outcome` as in `replies.Ended`; `losses`: of the attempts before."""
    if outcome == "retried":
        return Became(State.SCHEDULED, Step.BACK, losses)
    if outcome in ("handed_back", "taken_back"):
        return Became(State.ACCEPTED, Step.BACK, losses)
    if outcome == "lost":
        again = rerun and losses + 1 < most_losses
        return Became(State.ACCEPTED if again else State.LOST, Step.BACK if again else Step.ENDED, losses + 1)
    return Became(State(outcome), Step.ENDED, losses)


@dataclass(frozen=True, slots=True)
class Holder:
    """What a row says of its newest attempt. `over`: that attempt has ended."""

    epoch: int
    attempt: int
    step: int
    losses: int
    rerun: bool
    final: bool
    incarnation: str | None

    def takes(self, epoch: int, attempt: int) -> bool:
        """Whether the end of this attempt is news. (Also of one that ended its job itself: it adds what it left.)"""
        mine = self.step == Step.COMMITTED and (self.epoch, self.attempt) == (epoch, attempt)
        return (mine or not self.final) and (self.epoch, self.attempt, self.step) < (epoch, attempt, Step.ENDED)

    def has(self, epoch: int, attempt: int) -> bool:
        """Whether the end of this attempt is there already (its answer was lost)."""
        return (self.epoch, self.attempt) == (epoch, attempt) and self.step in (Step.ENDED, Step.BACK)


_HOLDERS: Final = text("""
SELECT id, epoch, attempt, step, losses, rerun, state, incarnation FROM jobs
WHERE id = ANY(CAST(:ids AS text[])) ORDER BY id FOR NO KEY UPDATE
""")


def lock_holders(connection: Connection, jobs: Sequence[str]) -> Mapping[str, Holder]:
    """The rows of these jobs, locked until the end of the caller's transaction."""
    return {
        row[0]: Holder(row[1], row[2], row[3], row[4], row[5], row[6] in FINAL, row[7])
        for row in connection.execute(_HOLDERS, {"ids": list(jobs)})
    }


@dataclass(frozen=True, slots=True)
class Open:
    """An attempt that a row says is on a worker. Times in milliseconds, 0 means none."""

    job: str
    epoch: int
    attempt: int
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
_OF_NOBODY: Final = """NOT EXISTS (
  SELECT 1 FROM workers w WHERE w.incarnation = jobs.incarnation AND w.status IN ('ready', 'draining')
    AND NOT EXISTS (SELECT 1 FROM workers n WHERE n.name = w.name AND n.started_at > w.started_at
                    AND n.status IN ('ready', 'draining')))"""
_OPEN_HERE: Final = text(_OPEN.format("incarnation = :incarnation"))
_OPEN_NOWHERE: Final = text(_OPEN.format(_OF_NOBODY))
_COMMITTED_NOWHERE: Final = text(
    f"SELECT id, epoch, attempt FROM jobs WHERE step = {Step.COMMITTED.value} AND {_OF_NOBODY} ORDER BY id"
)


def open_attempts(connection: Connection, incarnation: str) -> list[Open]:
    """What Postgres says that a life of a worker holds."""
    return [Open(*row) for row in connection.execute(_OPEN_HERE, {"incarnation": incarnation})]


def orphans(connection: Connection) -> list[Open]:
    """What Postgres says that a life of a worker holds which has ended."""
    return [Open(*row) for row in connection.execute(_OPEN_NOWHERE)]


def close_orphans(connection: Connection) -> int:
    """Attempts that ended their jobs themselves and whose worker has ended: nobody else will say so. How many."""
    rows = connection.execute(_COMMITTED_NOWHERE).all()
    return sum(fencing.close(connection, job, epoch, attempt) for job, epoch, attempt in rows)


def give_back(
    connection: Connection, attempts: Sequence[Open], outcome: str | None, error: str, most_losses: int
) -> list[Applied]:
    """End open attempts which nobody holds any more. `outcome`: taken_back or lost; None: lost, if it had started. The
    rows that this changed."""
    if not attempts:
        return []
    now = now_ms(connection)
    transitions = []
    for one in attempts:
        ends_as = outcome or ("lost" if one.started_ms else "taken_back")
        losses = one.losses
        if outcome is None and not one.started_ms:
            # Nobody can say whether it was claimed before its worker was gone.
            losses = losses_in_doubt(losses, most_losses, one.rerun)
        after = became(ends_as, losses, most_losses, one.rerun)
        transitions.append(
            Transition(
                job=one.job,
                epoch=one.epoch,
                attempt=one.attempt,
                state=after.state,
                step=after.step,
                worker=one.worker,
                incarnation=one.incarnation,
                admitted_ms=one.admitted_ms,
                started_ms=one.started_ms,
                at_ms=now,
                losses=after.losses,
                outcome=ends_as,
                error=error,
            )
        )
    return job_transitions.apply(connection, transitions)


def give_back_free(
    connection: Connection, attempts: Sequence[Open], outcome: str | None, error: str, most_losses: int
) -> list[Applied]:
    """End open attempts as `give_back`, in the caller's transaction, but for jobs whose rows somebody keeps locked:
    a later pass ends these."""
    try:
        with connection.begin_nested():
            return give_back(connection, attempts, outcome, error, most_losses)
    except OperationalError as problem:
        if not is_locked(problem):
            raise
    free = job_transitions.free(connection, [one.job for one in attempts])
    return give_back(connection, [one for one in attempts if one.job in free], outcome, error, most_losses)


def now_ms(connection: Connection) -> int:
    """Postgres's clock, in milliseconds."""
    return int(connection.execute(text("SELECT extract(epoch FROM clock_timestamp()) * 1000")).scalar_one())
