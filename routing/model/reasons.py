"""Reasons why a job does not run, in one family: those of the policy, and those of the way to it.

Reasons for which an action was refused are counted. They have a family of their own.
"""

from __future__ import annotations

from enum import Enum, StrEnum


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

    # -- of the way to the policy

    #: there is room: the job is admitted at this moment, or by the next sweep
    ABOUT_TO_START = "about-to-start"
    #: the job must not start before its time
    SCHEDULED = "scheduled"
    #: other jobs must succeed first
    NEEDS_JOBS = "needs-jobs"
    #: the jobs that started have used up the rate of the task
    RATE_LIMIT = "rate-limit"
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
    """Reason for which an action did not happen; the value is the name of its counter."""

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
