"""A job as it is submitted, its constraints, its publisher, and the result of its insert."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from celery_capacity.routing.model.states import Store
from celery_capacity.routing.model.token import Token


@dataclass(frozen=True, slots=True)
class Rate:
    """Rate at which jobs of a task may start. `per_second`: 0 means as many as fit. `said`: as somebody wrote it."""

    per_second: float
    said: str


@dataclass(frozen=True, slots=True)
class Constraints:
    """Constraints of a job beside its time and a worker (`routing.store.dependencies`), and its deduplication.

    `key`: while another job has this key, this job is not accepted; '' for none. `key_for`: seconds after the first job
    with the key in which that holds, though that job has ended. `after`: ids of jobs that must have succeeded.
    `tolerant`: an unknown id in `after` cancels this job, instead of refusing it. `burst`: seconds of the rate for
    which starts are saved up.
    """

    key: str = ""
    key_for: float = 0.0
    after: tuple[str, ...] = ()
    rate: Rate | None = None
    burst: float = 1.0
    tolerant: bool = False


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as it is submitted. `message` has the form of `routing.model.message`.

    `shape`: its request, and the class of its run time. `expected_ms`: that time itself; 0 where it is unknown.
    """

    id: str
    name: str
    shape: str
    message: bytes
    priority: int = 0
    declared: bool = True
    queue: str = "celery"
    retries: int = 0
    nesting: int = 0
    #: The attempt of the same job that publishes this one (a retry); None where it is not known.
    publisher: int | None = None
    #: False: the first lost attempt ends the job.
    rerun: bool = True
    root_id: str | None = None
    parent_id: str | None = None
    #: The job in whose replacement (`Task.replace`) this job is a step.
    replaces: str | None = None
    due_at: datetime | None = None
    expires_at: datetime | None = None
    constraints: Constraints | None = None
    #: The job's stamped headers as JSON: {name: [values]}. None: it has none.
    stamps: str | None = None
    expected_ms: int = 0
    #: Limits by key as JSON (`routing.store.key_limits`): {key: {most, per_second, said}}. None: it has none.
    key_limits: str | None = None
    #: A retry with a priority that its task gave: it has that one, whatever an operator or its age made of the job's.
    priority_given: bool = False

    @property
    def starts(self) -> bool:
        """Return True if the job may start at once, as far as its time and its keys go."""
        return self.due_at is None and self.key_limits is None


@dataclass(frozen=True, slots=True)
class Publisher:
    """The attempt that publishes a job. `incarnation`: that of the attempt's worker."""

    job: str
    token: Token
    incarnation: str


class Existing(Enum):
    """Result of a publish under an id that has a row."""

    #: The publish is there already, or comes too late.
    IGNORED = "ignored"
    #: The attempt that publishes has lost its lease.
    STALE = "stale"
    #: The row keeps the publish as the successor of its running attempt.
    SUCCESSOR = "successor"
    #: The row is accepted, and may start. The ledger may not have it.
    ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class Inserted:
    """The result of a job's insert.

    `seq`: the order of submission. It is None where nothing was inserted: the id exists, or the job `same_as` has the
    key. `epoch`, `authority`: as confirmed by this insert. `starts`: False where the job waits for its
    time, or behind a constraint. `existing`: what became of a publish under an existing id, where that was asked.
    """

    seq: int | None
    epoch: int
    authority: Store
    starts: bool = True
    same_as: str | None = None
    existing: Existing | None = None
