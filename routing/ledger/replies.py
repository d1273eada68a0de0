"""Replies of the ledger: plain values, one class for each operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from celery_capacity.routing.errors import StoreUnavailable

#: Value of `rerun`, in arguments and replies of scripts, for a job that its first lost attempt ends.
NEVER_AGAIN: Final = "0"


class LedgerClosed(Exception):
    """The ledger did not act: it is cold (`epoch` is None), or of another epoch than the caller confirmed."""

    def __init__(self, epoch: int | None) -> None:
        super().__init__("the ledger is cold" if epoch is None else f"the ledger is in epoch {epoch}")
        self.epoch = epoch


class LedgerFull(StoreUnavailable):
    """Redis has reached its `maxmemory`, and takes no more jobs. Operations that free memory go on."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """Reply to a submit. `state`: admitted, waiting, exists (`was`: its state) or late (past the deadline)."""

    state: str
    worker: str | None = None
    attempt: int | None = None
    was: str | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A waiting job that found a worker."""

    job: str
    worker: str
    attempt: int


#: A result kept in the ledger's own Redis: its key, seconds to live (0: for ever), and its text.
Kept = tuple[str, int, bytes | str]


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt that is over, as its worker reports it.

    `outcome`: a final state, retried, handed_back or lost. `results`: those that are kept in the ledger's own Redis.
    `outbox`: everything else to deliver, see `routing.model.outbox`. `told`: the worker tells the result, events and
    signals, even where the job ended as lost.
    """

    job: str
    token: str
    outcome: str
    error: str | None = None
    outbox: str = ""
    results: tuple[Kept, ...] = ()
    told: bool = False


@dataclass(frozen=True, slots=True)
class Released:
    """Reply to the release of an attempt.

    `verdict`: released, repeat (the attempt was released before), stale (it no longer held the job) or unknown (the job
    has no key). `state`: the job's state now. `entry`: the stream entry that says so.
    """

    end: Ended
    verdict: str
    state: str
    entry: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """Reply to a claim; times in milliseconds of the server's clock.

    `verdict`: claimed, stale (or doubled), forged (the message differs from the one that was pushed) or unknown (no
    such job).
    """

    job: str
    token: str
    verdict: str
    admitted_ms: int | None
    started_ms: int | None
    entry: str
    losses: int
    rerun: bool = True
    #: The job was revoked after its admission: the worker that claims it ends it.
    revoked: bool = False

    @property
    def ok(self) -> bool:
        """Return True if the attempt may start."""
        return self.verdict == "claimed"


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A job admitted and claimed in the release that made room for it.

    `message` has the delivery tag of the attempt. `shape`: that of its allocation.
    """

    job: str
    token: str
    admitted_ms: int
    started_ms: int
    entry: str
    losses: int
    shape: str
    message: str
    rerun: bool = True


@dataclass(frozen=True, slots=True)
class Settled:
    """Replies to the attempts that ended and to those that arrived, and the jobs handed over.

    `shapes`, `cursors`: the places from which `Ledger.follow` goes on.
    """

    released: list[Released]
    claimed: list[Claimed]
    handed_over: list[HandedOver]
    shapes: list[str] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Adopted:
    """A job that a worker has held since an older epoch."""

    job: str
    token: str
    shape: str
    order: int
    admitted_ms: int
    started_ms: int
    nonce: str
    losses: int
    rerun: bool = True


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Reply to a cancel.

    `verdict`: ended (as `entry` of the stream says), held (by `worker`), over, missing, or unsure. Unsure: the books
    are being rebuilt, so a worker may hold the job.
    """

    verdict: str
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
    """Reply to a lapse.

    `verdict`: alive, closed (just now; its jobs are taken back later), waits (for that), due (for that), gone or
    unknown.
    """

    verdict: str
    incarnation: str | None
    taken_back: int


def claims(arrived: Sequence[tuple[str, ...]], values: list[str]) -> Iterable[Claimed]:
    """Read the groups in the reply of the script `claim`."""
    for index, (job, token, *_) in enumerate(arrived):
        verdict, admitted, started, entry, losses, rerun, revoked = values[7 * index : 7 * index + 7]
        lost, again = int(losses or 0), rerun != NEVER_AGAIN
        yield Claimed(job, token, verdict, _ms(admitted), _ms(started), entry, lost, again, bool(revoked))


def hand_overs(values: list[str]) -> list[HandedOver]:
    """Read the jobs in the reply of a script that hands over."""
    jobs = []
    for start in range(0, len(values), 9):
        job, token, admitted, started, entry, losses, shape, rerun, message = values[start : start + 9]
        again = rerun != NEVER_AGAIN
        jobs.append(HandedOver(job, token, int(admitted), int(started), entry, int(losses), shape, message, again))
    return jobs


def _ms(text: str) -> int | None:
    return int(text) if text else None
