"""Replies of the ledger: plain values, one class for each operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.model.states import Outcome, State
from celery_capacity.routing.model.token import Token

#: Value of `rerun`, in arguments and replies of scripts, for a job that its first lost attempt ends.
NEVER_AGAIN: Final = "0"


class SubmitVerdict(StrEnum):
    """Answer to a submit; the value is the word of `submit`."""

    ADMITTED = "admitted"
    WAITING = "waiting"
    #: the ledger knows the job already, or has its transition of an older epoch
    EXISTS = "exists"
    #: the head of the backlog is full, and the job waits in Postgres
    LEFT = "left"
    #: past the deadline of its row
    LATE = "late"


class PlaceVerdict(StrEnum):
    """Answer to a new priority; the value is the word of `reprioritize`."""

    #: the job waits in another place
    MOVED = "moved"
    #: a worker has it: its next attempt has the priority
    HELD = "held"
    #: it waits in Postgres alone
    STAYING = "staying"
    #: the ledger does not have it
    MISSING = "missing"


class ReleaseVerdict(StrEnum):
    """Answer to the end of an attempt; the value is the word of `release`."""

    RELEASED = "released"
    #: the attempt was released before
    REPEAT = "repeat"
    #: the attempt no longer held the job
    STALE = "stale"
    #: the job has no key
    UNKNOWN = "unknown"


class ClaimVerdict(StrEnum):
    """Answer to a message that arrived; the value is the word of `claim`."""

    CLAIMED = "claimed"
    #: older than its job, or doubled
    STALE = "stale"
    #: the message differs from the one that was pushed
    FORGED = "forged"
    #: there is no such job in this epoch
    UNKNOWN = "unknown"


class AdoptVerdict(StrEnum):
    """Answer to a job that a worker held before; the value is the word of `adopt`."""

    ADOPTED = "adopted"
    #: another attempt has the job, or it has ended
    STALE = "stale"


class CancelVerdict(StrEnum):
    """Answer to a cancel; the value is the word of `cancel`."""

    #: the job ended, as an entry of the stream says
    ENDED = "ended"
    #: a worker holds the job
    HELD = "held"
    #: the job had ended before
    OVER = "over"
    #: the ledger does not know the job
    MISSING = "missing"
    #: the books are being rebuilt, so a worker may hold the job
    UNSURE = "unsure"


class LapseVerdict(StrEnum):
    """Answer for a worker whose lease may have run out; the value is the word of `lapse`."""

    ALIVE = "alive"
    #: just now; its jobs are taken back later
    CLOSED = "closed"
    #: for the grace, or for a job that the worker keeps
    WAITS = "waits"
    #: the grace is over
    DUE = "due"
    #: it holds more jobs
    MORE = "more"
    GONE = "gone"
    UNKNOWN = "unknown"


class LedgerClosed(Exception):
    """The ledger did not act: it is cold (`epoch` is None), or of another epoch than the caller confirmed."""

    def __init__(self, epoch: int | None) -> None:
        super().__init__("the ledger is cold" if epoch is None else f"the ledger is in epoch {epoch}")
        self.epoch = epoch


class LedgerFull(StoreUnavailable):
    """Redis has reached its `maxmemory`, and takes no more jobs. Operations that free memory go on."""


@dataclass(frozen=True, slots=True)
class Brought:
    """Reply to many jobs. `taken`: how many the ledger took. `left`: the places of those that stay in Postgres."""

    taken: int
    left: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Submitted:
    """Reply to a submit. `was`: the state of a job that exists."""

    state: SubmitVerdict
    worker: str | None = None
    attempt: int | None = None
    was: str | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A waiting job that found a worker."""

    job: str
    worker: str
    attempt: int


class Arrived(NamedTuple):
    """A message that a worker got. `nonce`: unique to its claim. `digest`: of the message, '' where it is unknown."""

    job: str
    token: Token
    nonce: str
    digest: str = ""


#: A result kept in the ledger's own Redis: its key, seconds to live (0: for ever), and its text.
Kept = tuple[str, int, bytes | str]


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt that is over, as its worker reports it.

    `results`: those that are kept in the ledger's own Redis. `outbox`: everything else to deliver, see
    `routing.model.outbox`. `told`: the worker tells the result, events and signals, even where the job ended as lost.
    """

    job: str
    token: Token
    outcome: Outcome
    error: str | None = None
    outbox: str = ""
    results: tuple[Kept, ...] = ()
    told: bool = False


@dataclass(frozen=True, slots=True)
class Released:
    """Reply to the release of an attempt.

    `state`: the job's state now, None where the attempt did not hold it. `entry`: the stream entry that says so.
    """

    end: Ended
    verdict: ReleaseVerdict
    state: State | None
    entry: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """Reply to a claim; times in milliseconds of the server's clock."""

    job: str
    token: Token
    verdict: ClaimVerdict
    admitted_ms: int | None
    started_ms: int | None
    entry: str
    losses: int
    rerun: bool = True
    #: The job was revoked after its admission: the worker that claims it ends it.
    revoked: bool = False
    #: When the job was submitted; 0 where the ledger does not know.
    submitted_ms: int = 0

    @property
    def ok(self) -> bool:
        """Return True if the attempt may start."""
        return self.verdict is ClaimVerdict.CLAIMED


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A job admitted and claimed in the release that made room for it.

    `message` has the delivery tag of the attempt. `shape`: that of its allocation.
    """

    job: str
    token: Token
    admitted_ms: int
    started_ms: int
    entry: str
    losses: int
    shape: str
    message: str
    rerun: bool = True
    #: When the job was submitted; 0 where the ledger does not know.
    submitted_ms: int = 0


@dataclass(frozen=True, slots=True)
class Settled:
    """Replies to the attempts that ended and to those that arrived, and the jobs handed over.

    `shapes`, `cursors`, `freed` (workers): the places from which `Ledger.follow` goes on.
    """

    released: list[Released]
    claimed: list[Claimed]
    handed_over: list[HandedOver]
    shapes: list[str] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    freed: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Settling:
    """A `settle` that is made of `calls`. `meant`: the run of the server that they name, once they are sent."""

    ended: Sequence[Ended]
    arrived: Sequence[Arrived]
    admit: bool
    calls: list[tuple[str, list[Any]]]
    meant: str = ""


@dataclass(frozen=True, slots=True)
class Adopted:
    """A job that a worker has held since an older epoch."""

    job: str
    token: Token
    shape: str
    order: int
    admitted_ms: int
    started_ms: int
    nonce: str
    losses: int
    rerun: bool = True


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Reply to a cancel. `worker`: the one that holds the job. `entry`: the stream entry that says that it ended."""

    verdict: CancelVerdict
    worker: str | None = None
    entry: str | None = None


@dataclass(frozen=True, slots=True)
class Filled:
    """Number of waiting jobs that were admitted."""

    admitted: int


@dataclass(frozen=True, slots=True)
class Taken:
    """The name of a worker belongs to another incarnation."""

    incarnation: str
    lease_left_ms: int
    held: int


@dataclass(frozen=True, slots=True)
class Renewed:
    """Reply to a heartbeat. `known`: True if the lease was renewed; else the worker must register again."""

    known: bool
    taken_back: int


@dataclass(frozen=True, slots=True)
class Lapsed:
    """Reply to a lapse."""

    verdict: LapseVerdict
    incarnation: str | None
    taken_back: int


def claims(arrived: Sequence[Arrived], values: list[str]) -> Iterable[Claimed]:
    """Read the groups in the reply of the script `claim`."""
    for index, (job, token, *_) in enumerate(arrived):
        verdict, admitted, started, entry, losses, rerun, revoked, submitted = values[8 * index : 8 * index + 8]
        times, lost, marks = (_ms(admitted), _ms(started)), int(losses or 0), (rerun != NEVER_AGAIN, bool(revoked))
        yield Claimed(job, token, ClaimVerdict(verdict), *times, entry, lost, *marks, int(submitted or 0))


def hand_overs(values: list[str]) -> list[HandedOver]:
    """Read the jobs in the reply of a script that hands over."""
    jobs = []
    for start in range(0, len(values), 10):
        job, token, admitted, started, entry, losses, shape, rerun, submitted, message = values[start : start + 10]
        facts = (int(losses), shape, message, rerun != NEVER_AGAIN, int(submitted or 0))
        jobs.append(HandedOver(job, Token.parse(token), int(admitted), int(started), entry, *facts))
    return jobs


def _ms(text: str) -> int | None:
    return int(text) if text else None
