"""Reasons why a job does not run, in one family: those of the policy, and those of the way to it.

Reasons for which an action was refused, or a message set aside, are counted. They have a family of their own.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from enum import Enum, StrEnum
from typing import Any, Final

from celery_capacity.routing import os_threads
from celery_capacity.routing.errors import (
    BacklogFull,
    InvalidRequest,
    MessageTooDeep,
    MessageTooLarge,
    NotAccepted,
    PlatformError,
    Unsupported,
)


class Reason(Enum):
    """Reason why a job does not run; the value is the stable name in counters and JSON."""

    # -- of the policy: no worker takes the job now

    #: no worker admits anything: none lives, or all are cordoned, draining or closed
    NO_WORKER = "no-worker"
    #: no worker has registered its task
    NO_TASK = "no-worker-knows-task"
    #: no worker serves its queue
    NO_QUEUE = "no-queue"
    #: no worker publishes this resource
    UNKNOWN_RESOURCE = "unknown-resource"
    #: fits no worker that admits, even if it were empty
    TOO_LARGE = "too-large"
    #: would fit an empty worker; none has room now
    NO_ROOM = "no-room"
    #: none of the examined candidates has room; more candidates come behind the worker named. No job waits for it
    LOOK_FURTHER = "look-further"
    #: jobs with the same request wait before it
    BEHIND_SHAPE = "behind-shape"
    #: its last attempt runs alone on a worker, and no worker that it would fit is empty
    ALONE = "alone"
    #: would fit, and no worker that it fits lives long enough for it
    NO_TIME = "no-time"
    #: only a worker that is reserved for an earlier job has room
    RESERVED = "reserved"
    #: no worker has the labels, or the name, that it asks for
    NO_LABEL = "no-label"

    # -- of the way to the policy

    #: there is room: the job is admitted at this moment, or by the next sweep
    ABOUT_TO_START = "about-to-start"
    #: its tenant holds as much as its quota allows
    TENANT_QUOTA = "tenant-quota"
    #: no worker has room now, and jobs of tenants that are further below their share come first
    TENANT_SHARE = "tenant-share"
    #: an operator paused the platform, its queue or its task
    PAUSED = "paused"
    #: a worker has room for it, and an operator has cordoned that worker
    CORDONED = "cordoned"
    #: the job must not start before its time
    SCHEDULED = "scheduled"
    #: other jobs must succeed first
    NEEDS_JOBS = "needs-jobs"
    #: the jobs that started have used up the rate of the task
    RATE_LIMIT = "rate-limit"
    #: other jobs hold one of its keys, or have used up the rate of one
    KEY_LIMIT = "key-limit"
    #: the job is durable and not in the open ledger yet: its sender brings it, or died and the sweep brings it
    ON_ITS_WAY = "on-its-way"
    #: the ledger is cold, so nothing is admitted until its books are rebuilt
    LEDGER_CLOSED = "ledger-closed"
    #: Redis does not answer
    LEDGER_UNREACHABLE = "ledger-unreachable"
    #: Postgres admits instead of the ledger
    LEDGER_STANDS_BACK = "ledger-stands-back"
    #: the task replaced itself, and its replacement ends this job
    REPLACED = "replaced"

    # -- no reason to wait

    #: the job does not wait: it is with a worker
    RUNS = "runs"
    #: the job does not wait: it ended
    ENDED = "ended"


#: Reasons of the policy.
OF_POLICY = tuple(Reason)[: tuple(Reason).index(Reason.ABOUT_TO_START)]
#: Reasons that an explanation of a job gives: all but the one that a search alone gives.
EXPLAINED = tuple(reason for reason in Reason if reason is not Reason.LOOK_FURTHER)


class Refusal(StrEnum):
    """Reason for which an action did not happen, or a message was set aside; the value is the name of its counter."""

    #: a claim of a message that is doubled, older than its job, or of no job
    STALE_CLAIM = "stale.claim"
    #: an end of an attempt that no longer held its job
    STALE_RELEASE = "stale.release"
    #: a publish by such an attempt
    STALE_PUBLISH = "stale.publish"
    #: a `fenced` block of such an attempt, or of a job that has ended
    STALE_COMMIT = "stale.commit"
    #: a job that a worker named after the ledger was lost, and that had gone elsewhere
    STALE_ADOPT = "stale.adopt"
    #: a submission that reached the ledger past its deadline
    LATE = "refused.late"
    #: a result that Redis did not take
    RESULT = "refused.result"
    #: a message of a newer format
    FORMAT = "refused.format"
    #: a message of a task that its worker has not registered
    TASK = "refused.task"
    #: a message that differs from the one that was pushed
    FORGED = "refused.forged"
    #: a submission while too many jobs wait
    BACKLOG = "refused.backlog"
    #: a submission that Postgres did not take, or that nobody could give it
    NOT_ACCEPTED = "refused.not_accepted"
    #: a submission with a wrong amount, name or argument
    INVALID = "refused.invalid"
    #: a submission whose message has too many bytes
    TOO_LARGE = "refused.too_large"
    #: a submission whose message is nested too deep
    TOO_DEEP = "refused.too_deep"
    #: a submission that asks for a feature which the platform does not offer
    UNSUPPORTED = "refused.unsupported"

    # -- in the quarantine

    #: a message that is not JSON in UTF-8
    NOT_JSON = "set_aside.not_json"
    #: a message that lacks a field, or has one of the wrong kind
    NO_MESSAGE = "set_aside.no_message"
    #: a message whose lists and objects are nested too deep
    NESTED = "set_aside.too_deep"
    #: a message whose body, headers or properties cannot be decoded
    UNDECODABLE = "set_aside.undecodable"
    #: a message of another program of which no job can be made
    NO_JOB = "set_aside.no_job"
    #: a message in a worker's own queue that the ledger did not put there
    FOREIGN = "set_aside.foreign"
    #: an entry of the stream that no script wrote
    NO_TRANSITION = "set_aside.no_transition"
    #: a transition that Postgres takes in no way
    UNWRITABLE = "set_aside.unwritable"
    #: an undelivered end of an attempt that nobody can read
    UNREADABLE_OUTBOX = "set_aside.outbox"

    @property
    def word(self) -> str:
        """Return the reason without the kind of refusal, as the quarantine keeps it."""
        return self.partition(".")[2]


#: Refusals of submissions by their errors. The first class that an error belongs to counts.
SUBMISSIONS: Final[tuple[tuple[type[PlatformError], Refusal], ...]] = (
    (BacklogFull, Refusal.BACKLOG),
    (NotAccepted, Refusal.NOT_ACCEPTED),
    (MessageTooLarge, Refusal.TOO_LARGE),
    (MessageTooDeep, Refusal.TOO_DEEP),
    (InvalidRequest, Refusal.INVALID),
    (Unsupported, Refusal.UNSUPPORTED),
)


class Tally:
    """Counts that go to the ledger with the next call of a script. Thread-safe.

    Greenlets share the lock with threads of the operating system. No greenlet yields while it holds the lock.
    """

    def __init__(self) -> None:
        self._start_anew()
        _tallies.add(self)

    def _start_anew(self) -> None:
        self._lock: Any = os_threads.allocate_lock()
        self._counts: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, name: str, times: int = 1) -> None:
        """Add to a counter."""
        if times:
            with self._lock:
                self._counts[name] += times

    def add_all(self, counts: Counter[str]) -> None:
        """Add to several counters."""
        if counts:
            with self._lock:
                self._counts.update(counts)

    def refuse(self, error: PlatformError) -> None:
        """Count a refused submission by its error, once, however many callers it passes through."""
        if not error.counted:
            error.counted = True
            for kind, refusal in SUBMISSIONS:
                if isinstance(error, kind):
                    self.add(refusal)
                    return

    def take(self) -> Counter[str]:
        """Return the counts, which the caller tells the ledger or adds again."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts


_tallies: Final[weakref.WeakSet[Tally]] = weakref.WeakSet()


def _after_fork() -> None:
    """Empty the tallies in a child: the parent tells its counts, and a thread of it may hold the lock."""
    for tally in list(_tallies):
        tally._start_anew()


os.register_at_fork(after_in_child=_after_fork)
