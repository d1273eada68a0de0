"""What the ledger answers: plain values, one for each operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from celery_capacity.routing.errors import StoreUnavailable

#: What scripts are told, and say, of a job that its first lost attempt ends.
NEVER_AGAIN: Final = "0"


class LedgerClosed(Exception):
    """The ledger did not act: it is cold (`epoch` is None), or of another epoch than the caller confirmed."""

    def __init__(self, epoch: int | None) -> None:
        super().__init__("the ledger is cold" if epoch is None else f"the ledger is in epoch {epoch}")
        self.epoch = epoch


class LedgerFull(StoreUnavailable):
    """Redis has reached its `maxmemory`, and takes no more jobs. What frees memory goes on."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """`state`: admitted, waiting, exists (`was`: its state) or late (past the deadline for submits)."""

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
    """An attempt that is over, as its worker reports it. `outcome`: a final state, retried, handed_back or lost.
    `results`: those that are kept in the ledger's own Redis. `outbox`: all else that is to be delivered, see
    `routing.model.outbox`. `told`: its worker tells the result, events and signals, also if the job ended as lost."""

    job: str
    token: str
    outcome: str
    error: str | None = None
    outbox: str = ""
    results: tuple[Kept, ...] = ()
    told: bool = False


@dataclass(frozen=True, slots=True)
class Released:
    """`verdict`: released, repeat (it was released before), stale (it no longer held the job) or unknown (there is no
    key of that job). `state`: of the job now. `entry`: the stream entry that says so."""

    end: Ended
    verdict: str
    state: str
    entry: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """The answer to a claim; times in milliseconds of the server. `verdict`: claimed, stale (or doubled), forged (the
    message is not the one that was pushed) or unknown (no such job)."""

    job: str
    token: str
    verdict: str
    admitted_ms: int | None
    started_ms: int | None
    entry: str
    losses: int
    rerun: bool = True
    #: It was revoked after it had been admitted: whoever claims it ends it.
    revoked: bool = False

    @property
    def ok(self) -> bool:
        """Whether the attempt may start."""
        return self.verdict == "claimed"


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A job admitted and claimed in the release that made room for it; `message` with the tag of its attempt.
    `shape`: of what it holds."""

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
    """The answers to what ended and what arrived, and what was handed over. `shapes`, `cursors`: where the ledger is to
    be asked for more (`Ledger.follow`)."""

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
    """`verdict`: ended (as `entry` of the stream says), held (by `worker`), over, missing, or unsure: nobody knows."""

    verdict: str
    worker: str | None = None
    entry: str | None = None


@dataclass(frozen=True, slots=True)
class Filled:
    """How many waiting jobs were admitted."""

    admitted: int


@dataclass(frozen=True, slots=True)
class Taken:
    """The name of a worker belongs to another incarnation."""

    incarnation: str
    lease_left_ms: int
    held: int


@dataclass(frozen=True, slots=True)
class Renewed:
    """`known`: the lease was renewed; else the worker must register again."""

    known: bool
    taken_back: int


@dataclass(frozen=True, slots=True)
class Lapsed:
    """`verdict`: alive, closed (just now; its jobs are taken back later), waits (for that), due (for it), gone or
    unknown."""

    verdict: str
    incarnation: str | None
    taken_back: int


def claims(arrived: Sequence[tuple[str, ...]], values: list[str]) -> Iterable[Claimed]:
    """Read the groups in the reply of the script claim."""
    for index, (job, token, *_) in enumerate(arrived):
        verdict, admitted, started, entry, losses, rerun, revoked = values[7 * index : 7 * index + 7]
        lost, again = int(losses or 0), rerun != NEVER_AGAIN
        yield Claimed(job, token, verdict, _ms(admitted), _ms(started), entry, lost, again, bool(revoked))


def hand_overs(values: list[str]) -> list[HandedOver]:
    """Jobs in the reply of a script that hands over."""
    found = []
    for start in range(0, len(values), 9):
        job, token, admitted, started, entry, losses, shape, rerun, message = values[start : start + 9]
        again = rerun != NEVER_AGAIN
        found.append(HandedOver(job, token, int(admitted), int(started), entry, int(losses), shape, message, again))
    return found


def _ms(text: str) -> int | None:
    return int(text) if text else None
