"""The states of a job and the one table of its transitions.

The Lua scripts, the guards of the SQL statements and the diagram in docs/reference/states.md have no edge beside this
table. Tests hold all three to it.

Three rules hold for every edge:

- A final state has no exit. A later writer came too late, and is told so.
- An edge out of `admitted` or `running` belongs to an attempt and needs the current token. An older attempt is refused,
  whatever it reports. An edge into an attempt makes or brings a newer token. All other edges compare the state alone.
- Inside one attempt, `Step` only grows. Postgres is written later than the ledger, from more than one place and
  sometimes twice. A row takes an entry only if (epoch, attempt, step) is larger than its own, so a late or a doubled
  entry does no harm.

Postgres may see later entries of an attempt without its claim, when the claim's entry was lost with the ledger. So
every event that ends a running job may also end an admitted one. `ADOPT` makes a row running when a live worker says
that it runs the job.
"""

from __future__ import annotations

from enum import Enum, IntEnum, StrEnum

from celery_capacity.routing.model.token import Token


class State(StrEnum):
    """Where a job is; the value is the word that Postgres, JSON and people see."""

    #: durable in Postgres, not known to the ledger yet. The sender moves the job on; after a crash the duty for
    #: accepted jobs does
    ACCEPTED = "accepted"
    #: in the backlog, no worker has room. A release, a registration or the sweep moves the job on
    WAITING = "waiting"
    #: must not start before its time, or before its constraints are met. The duty for scheduled jobs moves it on
    SCHEDULED = "scheduled"
    #: holds an allocation, its message is in the worker's queue. The claim moves the job on; after a crash the message
    #: is delivered again
    ADMITTED = "admitted"
    #: claimed and started. The job's end moves it on; after the death of its worker the lapse does
    RUNNING = "running"
    #: ended by `Task.replace`; the replacement carries the id on and ends the job
    REPLACED = "replaced"
    #: final: returned a result
    SUCCEEDED = "succeeded"
    #: final: raised, was ended by a limit, or fitted no registered worker for too long
    FAILED = "failed"
    #: final: revoked, or a job that it needs did not succeed
    CANCELLED = "cancelled"
    #: final: its `expires` passed before it started
    EXPIRED = "expired"
    #: final: too many of its attempts were lost with their worker
    LOST = "lost"


#: final states: a job stays in them
FINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED, State.LOST})
#: states in which a job holds an allocation on a worker
HOLDING = frozenset({State.ADMITTED, State.RUNNING})


class Outcome(StrEnum):
    """End of an attempt; the value is the word in the ledger, in `attempts` and on pages."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    #: by `Task.replace`
    REPLACED = "replaced"
    #: by `Task.retry`
    RETRIED = "retried"
    #: by `Reject(requeue=True)`: the same message again, behind others
    REQUEUED = "requeued"
    #: by its own worker, before it started or as the worker ends
    HANDED_BACK = "handed_back"
    #: from a worker that does not hold it; it had not started, or its job has a newer attempt
    TAKEN_BACK = "taken_back"
    #: with its process, its worker or its worker's lease
    LOST = "lost"


class Store(StrEnum):
    """The store that admits jobs; the value is the word in the table `authority`."""

    LEDGER = "ledger"
    POSTGRES = "postgres"


class WorkerStatus(StrEnum):
    """Status of a worker; the value is the word in its book, in its row and on pages."""

    READY = "ready"
    #: ends its jobs, and takes no more
    DRAINING = "draining"
    #: in its book: its lease ran out, or it has not said yet what it holds
    CLOSED = "closed"
    #: in its row: it has ended by itself
    LEFT = "left"
    #: in its row: it was given up
    LOST = "lost"


class Event(Enum):
    """Event that moves a job from state to state; the value is the word on the edge of the diagram."""

    FILE = "file"
    SCHEDULE = "schedule"
    ADMIT = "admit"
    CLAIM = "claim"
    #: a live worker says that it runs this job, and the books do not know it
    ADOPT = "adopt"
    #: the worker itself hands the job back: it drains, or its own count says that the job does not fit
    HAND_BACK = "hand back"
    #: taken from a worker that is lost or does not hold the job, into the backlog of a ledger that knows the job
    TAKE_BACK = "take back"
    #: taken in the same way, where the ledger does not know the job: it is submitted to the ledger again
    RESUBMIT = "resubmit"
    #: `Task.retry` without a countdown
    RETRY = "retry"
    #: `Task.retry` with a countdown or an eta
    RETRY_LATER = "retry later"
    #: `Reject(requeue=True)`
    REQUEUE = "requeue"
    REPLACE = "replace"
    #: the replacement's step that carries the replaced job's id is published
    CONTINUE = "continue"
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    EXPIRE = "expire"
    LOSE = "lose"


TRANSITIONS: dict[tuple[State, Event], State] = {
    # on the way to a worker
    (State.ACCEPTED, Event.FILE): State.WAITING,
    (State.ACCEPTED, Event.SCHEDULE): State.SCHEDULED,
    (State.ACCEPTED, Event.ADMIT): State.ADMITTED,
    (State.SCHEDULED, Event.FILE): State.WAITING,
    (State.SCHEDULED, Event.ADMIT): State.ADMITTED,
    (State.WAITING, Event.ADMIT): State.ADMITTED,
    (State.ADMITTED, Event.CLAIM): State.RUNNING,
    # a live worker knows better than lost books
    (State.ACCEPTED, Event.ADOPT): State.RUNNING,
    (State.SCHEDULED, Event.ADOPT): State.RUNNING,
    (State.WAITING, Event.ADOPT): State.RUNNING,
    (State.ADMITTED, Event.ADOPT): State.RUNNING,
    # back, for another attempt
    (State.ADMITTED, Event.HAND_BACK): State.WAITING,
    (State.RUNNING, Event.HAND_BACK): State.WAITING,
    (State.ADMITTED, Event.TAKE_BACK): State.WAITING,
    (State.RUNNING, Event.TAKE_BACK): State.WAITING,
    (State.ADMITTED, Event.RESUBMIT): State.ACCEPTED,
    (State.RUNNING, Event.RESUBMIT): State.ACCEPTED,
    (State.ADMITTED, Event.RETRY): State.ACCEPTED,
    (State.RUNNING, Event.RETRY): State.ACCEPTED,
    (State.ADMITTED, Event.RETRY_LATER): State.SCHEDULED,
    (State.RUNNING, Event.RETRY_LATER): State.SCHEDULED,
    (State.ADMITTED, Event.REQUEUE): State.SCHEDULED,
    (State.RUNNING, Event.REQUEUE): State.SCHEDULED,
    # replaced, and carried on
    (State.ADMITTED, Event.REPLACE): State.REPLACED,
    (State.RUNNING, Event.REPLACE): State.REPLACED,
    (State.REPLACED, Event.CONTINUE): State.ACCEPTED,
    # ends
    (State.ADMITTED, Event.SUCCEED): State.SUCCEEDED,
    (State.RUNNING, Event.SUCCEED): State.SUCCEEDED,
    (State.REPLACED, Event.SUCCEED): State.SUCCEEDED,
    (State.ADMITTED, Event.FAIL): State.FAILED,
    (State.RUNNING, Event.FAIL): State.FAILED,
    (State.REPLACED, Event.FAIL): State.FAILED,
    (State.ACCEPTED, Event.FAIL): State.FAILED,
    (State.WAITING, Event.FAIL): State.FAILED,
    (State.ACCEPTED, Event.CANCEL): State.CANCELLED,
    (State.SCHEDULED, Event.CANCEL): State.CANCELLED,
    (State.WAITING, Event.CANCEL): State.CANCELLED,
    (State.ADMITTED, Event.CANCEL): State.CANCELLED,
    (State.RUNNING, Event.CANCEL): State.CANCELLED,
    (State.REPLACED, Event.CANCEL): State.CANCELLED,
    (State.ACCEPTED, Event.EXPIRE): State.EXPIRED,
    (State.SCHEDULED, Event.EXPIRE): State.EXPIRED,
    (State.WAITING, Event.EXPIRE): State.EXPIRED,
    (State.ADMITTED, Event.EXPIRE): State.EXPIRED,
    (State.RUNNING, Event.EXPIRE): State.EXPIRED,
    (State.REPLACED, Event.EXPIRE): State.EXPIRED,
    (State.ADMITTED, Event.LOSE): State.LOST,
    (State.RUNNING, Event.LOSE): State.LOST,
    (State.REPLACED, Event.LOSE): State.LOST,
}


class Step(IntEnum):
    """Rank of a transition inside one attempt (the column `jobs.step`); it only grows."""

    #: no attempt was made yet
    NONE = 0
    ADMITTED = 1
    RUNNING = 2
    #: the attempt ended the job itself, in the transaction of its effect (`routing.store.fencing`); its body goes on
    COMMITTED = 3
    #: its worker is given up: the attempt's own writes are refused
    GIVEN_UP = 4
    ENDED = 9
    #: ended, and the job is back for another attempt. Above ENDED: a retry's row takes its outcome first,
    #: then goes back
    BACK = 10
    #: filed in the backlog for the next attempt
    FILED = 11
    #: ended in the backlog, without another attempt
    DROPPED = 12


#: Rank of a transition: the token of its attempt, then its step. The rank of a job only grows.
Rank = tuple[Token, int]
