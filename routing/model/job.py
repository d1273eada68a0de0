"""A job as it is submitted, its constraints, who publishes it, and how its insert ended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Rate:
    """How many jobs of a task may start. `per_second`: 0 means as many as fit. `said`: as somebody wrote it."""

    per_second: float
    said: str


@dataclass(frozen=True, slots=True)
class Gates:
    """What a job waits for beside its time and a worker (`routing.store.dependencies`), and what it must not be equal
    to.

    `key`: '' for none; while another job has it, this one is not accepted. `key_for`: seconds after the first one in
    which that is so though it has ended. `after`: ids of jobs that must have succeeded; `tolerant`: one that is unknown
    cancels this job, rather than have it refused. `burst`: for how many seconds of its rate starts are saved up.
    """

    key: str = ""
    key_for: float = 0.0
    after: tuple[str, ...] = ()
    rate: Rate | None = None
    burst: float = 1.0
    tolerant: bool = False


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as it is submitted. `message` as `routing.model.message` makes it."""

    id: str
    name: str
    shape: str
    message: bytes
    priority: int = 0
    declared: bool = True
    queue: str = "celery"
    retries: int = 0
    nesting: int = 0
    #: The attempt of the same job that publishes this (a retry); None where nobody says.
    publisher: int | None = None
    #: False: its first lost attempt ends it.
    rerun: bool = True
    root_id: str | None = None
    parent_id: str | None = None
    #: The job in whose replacement (`Task.replace`) this is a step.
    replaces: str | None = None
    due_at: datetime | None = None
    expires_at: datetime | None = None
    gates: Gates | None = None
    #: Its stamped headers as JSON: {name: [values]}. None: it has none.
    stamps: str | None = None


@dataclass(frozen=True, slots=True)
class Publisher:
    """The attempt that publishes. `incarnation`: the life of its worker."""

    job: str
    epoch: int
    attempt: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class Inserted:
    """`seq`: the order of submission; None where nothing was inserted: the id existed, or `same_as` is the id of a job
    that has its key. `epoch`, `authority`: as confirmed by this insert. `starts`: False where it waits for its time, or
    behind a gate."""

    seq: int | None
    epoch: int
    authority: str
    starts: bool = True
    same_as: str | None = None
