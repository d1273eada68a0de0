"""The state of the model: both stores, two workers and the network, as immutable values.

No number in it grows without bound. A token is (epoch, attempt) as in the platform. A timer is either running or over.
A message is there or not. `Job` has all facts about one job, so that jobs may change places. It names a worker by its
index, so that workers may change places too (`canonical`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: Workers of the model, each with room for one job.
WORKERS: Final = (0, 1)
#: Index for no worker.
NOBODY: Final = -1

# -- states of a job, as in routing/model/states.py. A card in the ledger that is OVER is a tombstone.
ACCEPTED, WAITING, ADMITTED, RUNNING, SUCCEEDED, LOST, OVER = range(7)
FINAL: Final = (SUCCEEDED, LOST)
HOLDING: Final = (ADMITTED, RUNNING)
STATE_NAMES: Final = ("accepted", "waiting", "admitted", "running", "succeeded", "lost", "over")

# -- the rank of a transition inside one attempt, as `routing.model.states.Step`
STEP_NONE, STEP_ADMITTED, STEP_RUNNING, STEP_ENDED, STEP_BACK, STEP_FILED = 0, 1, 2, 9, 10, 11

# -- phases of an attempt in a worker's memory
#: its claim was carried out and the answer was lost: it claims again, with the same nonce
CLAIM_AGAIN: Final = 0
#: it was claimed, or handed over with a release; the answer is on its way
CLAIMED, HANDED = 1, 2
#: its body runs; its body returned; its release was carried out and the answer is on its way
STARTED, RETURNED, RELEASED = 3, 4, 5
#: it does not fit by the worker's own count, and is to be handed back
REFUSED: Final = 7
#: its body runs, and the worker knows that another attempt has the job
DISOWNED: Final = 6

# -- processes of workers
OFF, UP, PAUSED, DEAD = range(4)
# -- books of workers: none; closed until its worker has reported its jobs; open
NO_BOOK, RESERVED, OPEN = range(3)
# -- the list of a heartbeat: none on its way; on its way; on its way, and its worker waits for it no more
NO_LIST, LISTED, LISTED_LATE = range(3)
# -- opening an epoch: nobody does; it is begun in Postgres and the stream applied; the old books are removed
NOT_OPENING, BEGUN, WIPED = range(3)
# -- a running job of a worker that a heartbeat did not name: never; since just now; for a renew interval
NAMED, MISSING, MISSING_LONG = range(3)

Token = tuple[int, int]


class Record(NamedTuple):
    """A row in Postgres, or a transition on its way there.

    Its first three fields are its rank.
    """

    epoch: int
    attempt: int
    step: int
    state: int
    losses: int
    worker: int


class Card(NamedTuple):
    """The ledger's entry of a job."""

    state: int
    epoch: int
    attempt: int
    worker: int
    losses: int
    #: True if its attempt is known to have started.
    started: bool
    #: True if its message is here. Of an adopted job, only Postgres has the message.
    message: bool
    missing: int
    #: Of a tombstone: the final state of the job, and whether the time runs after which the tombstone is gone.
    became: int
    expiring: bool


class Held(NamedTuple):
    """An attempt in a worker's memory."""

    epoch: int
    attempt: int
    phase: int


class Job(NamedTuple):
    """All facts about one job anywhere; () where there is nothing."""

    rerun: bool
    row: Record | tuple[()]
    card: Card | tuple[()]
    #: The stream's entries.
    entries: tuple[Record, ...]
    #: Messages in private queues: worker, epoch, attempt.
    messages: tuple[tuple[int, int, int], ...]
    #: A submission on its way: attempts and losses of the row that it read.
    submission: tuple[int, int] | tuple[()]
    #: By worker: attempts in its memory, transitions that it has not written yet, whether its list names the job.
    held: tuple[tuple[Held, ...], tuple[Held, ...]]
    pending: tuple[tuple[Record, ...], tuple[Record, ...]]
    named: tuple[bool, bool]
    #: True if an older epoch's entry was in the stream when the old books were removed: nobody brings the job in.
    carried: bool
    #: Attempts whose bodies started. Only the invariants see them.
    starts: tuple[Token, ...]


class Worker(NamedTuple):
    """A worker's process, and its entries in the stores."""

    process: int
    #: The epoch in which it registered; 0 before.
    epoch: int
    book: int
    #: True if Postgres has given it up.
    lost: bool
    #: True if an answer to a claim or a release is on its way.
    asking: bool
    #: True if an answer was lost: the worker asks for the jobs that it was given.
    unsure: bool
    list: int


class Faults(NamedTuple):
    """Number of times that each fault may still happen."""

    crash: int = 0
    pause: int = 0
    emptied: int = 0
    restarted: int = 0
    lost_answer: int = 0
    silent_opener: int = 0
    redelivery: int = 0


class Common(NamedTuple):
    """Facts that concern no single job or worker."""

    #: The epoch that Postgres names, and the epoch of the books.
    epoch: int
    books: int
    cold: bool
    #: True if a new epoch is open, and the books that Postgres knows are not in it yet.
    rebuilding: bool
    opening: int
    #: True if an overtaken opener is about to remove old books.
    stray_wipe: bool
    faults: Faults


class State(NamedTuple):
    common: Common
    workers: tuple[Worker, Worker]
    jobs: tuple[Job, ...]


class Rules(NamedTuple):
    """Rules of the protocol.

    Without any one of them, the search finds the violation that it prevents.
    """

    #: A tombstone's time begins when Postgres has the end, and until then no submission passes it. Without the rule it
    #: begins when the attempt ends.
    tombstone_until_written: bool = True
    #: A submission that read its row before a tombstone's time began is refused when that time is over.
    submit_deadline: bool = True
    #: A job is taken back if two lists, a renew interval apart, did not name it. Without the rule, two lists suffice.
    held_by_time: bool = True
    #: A worker makes no list while an answer that may give it a job is on its way.
    renewal_exclusive: bool = True
    #: An opener removes nothing once a newer epoch is open.
    fenced_wipe: bool = True
    #: An opener removes no entry of the stream. Nobody brings in a job of which an older epoch's entry is there.
    stream_kept: bool = True
    #: A worker reports its jobs in a new epoch only when it has written its earlier ends.
    rejoin_after_written: bool = True
    #: A submission is refused if its row was read before the epoch was opened, or before a carried job was let in.
    rows_read_after: bool = True
    #: In a new epoch no row is submitted before each live worker has reported its jobs. The opener waits 2 s for that.
    reports_first: bool = True
    #: A message is claimed once: its nonce tells a claim that is asked again from a doubled message.
    claim_once: bool = True


class Bounds(NamedTuple):
    """The size of an exhausted model."""

    name: str
    jobs: int
    rerun: bool
    faults: Faults
    #: Lost attempts that end a job.
    most_losses: int = 2


def initial(bounds: Bounds) -> State:
    """Return the state in which nothing has been submitted and one worker has joined."""
    job = Job(bounds.rerun, (), (), (), (), (), ((), ()), ((), ()), (False, False), False, ())
    first = Worker(UP, 1, OPEN, False, False, False, NO_LIST)
    other = Worker(OFF, 0, NO_BOOK, False, False, False, NO_LIST)
    return canonical(
        State(Common(1, 1, False, False, NOT_OPENING, False, bounds.faults), (first, other), (job,) * bounds.jobs)
    )


# -- symmetry: workers and jobs may change places

_swapped: dict[Job, Job] = {}


def _elsewhere(worker: int) -> int:
    return worker if worker == NOBODY else 1 - worker


def _swap_all(records: tuple[Record, ...]) -> tuple[Record, ...]:
    return tuple(sorted(record._replace(worker=_elsewhere(record.worker)) for record in records))


def _swap(job: Job) -> Job:
    """Return the job as it is when both workers have changed places."""
    swapped = _swapped.get(job)
    if swapped is None:
        row, card = job.row, job.card
        swapped = job._replace(
            row=row._replace(worker=_elsewhere(row.worker)) if row else row,
            card=card._replace(worker=_elsewhere(card.worker)) if card else card,
            entries=_swap_all(job.entries),
            messages=tuple(sorted((1 - worker, epoch, attempt) for worker, epoch, attempt in job.messages)),
            held=job.held[::-1],
            pending=(_swap_all(job.pending[1]), _swap_all(job.pending[0])),
            named=job.named[::-1],
        )
        _swapped[job] = swapped
    return swapped


def canonical(state: State) -> State:
    """Return one state for all states that differ only in the names of jobs and workers."""
    common, workers, jobs = state
    if workers[0] < workers[1]:
        return state if _in_order(jobs) else State(common, workers, tuple(sorted(jobs)))
    turned = tuple(sorted(map(_swap, jobs)))
    if workers[1] < workers[0]:
        return State(common, workers[::-1], turned)
    return State(common, workers, min(turned, tuple(sorted(jobs))))


def _in_order(jobs: tuple[Job, ...]) -> bool:
    return len(jobs) < 2 or jobs[0] <= jobs[1]
