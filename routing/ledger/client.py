"""The ledger: the books in Redis, and one typed method for each script that reads or changes them.

A method checks nothing that its script checks: the script is the decision. What it returns is a value; when the
ledger cannot act it raises `LedgerClosed` (cold, or of another epoch than the caller's) or `StoreUnavailable`.
Nothing is sent a second time by the client itself: the scripts are idempotent, so the caller decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.election import Elections
from celery_capacity.routing.ledger.held_jobs import Held
from celery_capacity.routing.ledger.replies import (
    Cancelled,
    Ended,
    Filled,
    Released,
    Renewed,
    Settled,
    Taken,
    claims,
    hand_overs,
)
from celery_capacity.routing.model.envelope import digest_of

#: Messages that one script delivers again, so that admission never waits long for it.
REDELIVER_CHUNK: Final = 100
#: Pages of shapes that follow a release: 1,024 that the worker may take. Where more wait, the heartbeat looks at all.
RELEASE_PAGES: Final = 15


class Ledger(Held, Elections):
    """The scripts, one method each: what brings jobs in is in `routing.ledger.admission`, what goes through the jobs of
    a worker in `routing.ledger.held_jobs`, what reconcile alone uses in `routing.ledger.repair`."""

    # -- jobs ----------------------------------------------------------------------------------------------------

    def settle(
        self,
        worker: str,
        incarnation: str,
        *,
        ended: Sequence[Ended] = (),
        arrived: Sequence[tuple[str, ...]] = (),
        most_losses: int,
        admit: bool = True,
        nonce: str = "",
        follow: bool = True,
    ) -> Settled:
        """Release what ended and claim what arrived (job, token, nonce, and the digest of the message, if it is known).

        With a `nonce` of its own the worker takes what the release admits to it from the reply, claimed already.
        Without `follow` the caller calls that itself, when it holds what it was given.
        """
        calls: list[tuple[str, Sequence[Any]]] = []
        if ended:
            args: list[Any] = [*self._gate(), worker, incarnation, most_losses, "1" if admit else "0", nonce]
            for end in ended:
                args += (end.job, end.token, end.outcome, (end.error or "").encode("utf-8", "replace"))
                args += (end.outbox, "1" if end.told else "", len(end.results))
                for result in end.results:
                    args += result
            calls.append(("release", args))
        if arrived:
            args = [*self._gate(), worker, incarnation]
            for job, token, nonce, *digest in arrived:
                args += (job, token, nonce, *(digest or [""]))
            calls.append(("claim", args))
        replies = self._calls(calls) if calls else []
        settled = Settled([], [], [])
        for (name, _), reply in zip(calls, replies, strict=True):
            if name == "release":
                self._released(ended, reply, settled, admit)
            else:
                settled.claimed.extend(claims(arrived, reply))
        if follow:
            self.follow(worker, settled)
        return settled

    def _released(self, ended: Sequence[Ended], reply: list[str], settled: Settled, admit: bool) -> None:
        for index, end in enumerate(ended):
            verdict, state, entry, shape = reply[3 + 4 * index : 7 + 4 * index]
            settled.released.append(Released(end, verdict, state, entry))
            if admit and verdict == "released" and state == "waiting":
                settled.shapes.append(shape)
        settled.handed_over.extend(hand_overs(reply[3 + 4 * len(ended) :]))
        settled.cursors.append(reply[2])

    def follow(self, worker: str, settled: Settled) -> None:
        """After a release: what it put back may go to others, and what it did not look at to this worker."""
        self.place_all(settled.shapes)
        for cursor in settled.cursors:
            self.fill(worker, cursor, RELEASE_PAGES)

    def fill(self, worker: str, cursor: str = "-inf", pages: int | None = None) -> int:
        """Admit what fits on a worker, from a cursor of shapes ('' means there is nothing left to look at), looking at
        so many pages of shapes at the most."""
        admitted = 0
        while cursor and pages != 0:
            pages = None if pages is None else pages - 1
            reply = self._call("fill", *self._gate(), worker, cursor)
            admitted += int(reply[1])
            cursor = reply[2]
        return admitted

    def cancel(self, job: str, state: str, error: str = "") -> Cancelled:
        """End a job that waits, as `cancelled` or `expired`."""
        reply = self._call("cancel", *self._gate(), job, state, error)
        if reply[0] == "held":
            return Cancelled("held", worker=reply[2])
        return Cancelled(reply[0], entry=reply[1] if reply[0] == "ended" else None)

    def revoke(self, job: str) -> bool:
        """Note that a job was revoked which a worker holds; False where none does."""
        return self._call("revoke", *self._gate(), job)[0] == "held"

    def succeed(self, job: str, message: bytes) -> bool:
        """Note that a successor of the running attempt, with this message, is in Postgres."""
        return self._call("succeed", job, digest_of(message))[0] == "ok"

    def count(self, what: str, by: int = 1) -> None:
        """Count what no script saw."""
        self._guard(lambda: self.client.hincrby(keys.COUNTERS, what, by))

    def forget(self, entries: Sequence[tuple[str, str]]) -> int:
        """Drop stream entries (entry, job) that Postgres has."""
        args = [item for pair in entries for item in pair]
        return int(self._call("forget", *args)[1]) if entries else 0

    def redeliver(self) -> int:
        """Deliver again what was admitted and not claimed in time; returns how many messages went out."""
        delivered = 0
        while True:
            reply = self._call("redeliver", *self._gate(), REDELIVER_CHUNK)
            delivered += int(reply[2])
            if int(reply[1]) < REDELIVER_CHUNK:
                return delivered

    def drop(self, job: str, token: str, *, final: bool) -> bool:
        """Take out a job unless it changed since it was read; `final`: it may not come back."""
        reply = self._call("drop", *self._gate(), job, token, "1" if final else "0")
        if reply[0] == "ok" and reply[1]:
            self.fill(reply[1])
        return reply[0] == "ok"

    # -- workers -------------------------------------------------------------------------------------------------

    def register(
        self,
        worker: str,
        incarnation: str,
        queue: str,
        capacity: str,
        view: Mapping[str, str],
        status: str = "ready",
        *,
        admit: bool = True,
    ) -> Filled | Taken:
        """Open a worker's book; `capacity` in the form of a shape. `Taken` when the name belongs to another. With the
        status `closed` nothing is admitted before the next `renew`; without `admit` by this caller."""
        flat = [item for pair in view.items() for item in pair]
        args = (worker, incarnation, queue, self.ttl_ms, capacity, status, "1" if admit else "0")
        reply = self._counted("register", args, flat)
        if reply[0] == "taken":
            return Taken(incarnation=reply[1], lease_left_ms=int(reply[2]), held=int(reply[3]))
        return Filled(int(reply[1]) + self.fill(worker, reply[2]))

    def renew(
        self,
        worker: str,
        incarnation: str,
        view: Mapping[str, str],
        holds: Iterable[str],
        most_losses: int,
        *,
        admit: bool = True,
        missing_ms: int | None = None,
    ) -> Renewed:
        """Renew the lease with a list of what the worker holds. `known` is False where it must register again. Without
        `admit` nothing is admitted: this caller may not. `missing_ms`: a running job that no list has named for so long
        by the ledger's clock is taken back; a renew interval where it is None, 0: at once, negative: none is."""
        flat = [item for pair in view.items() for item in pair]
        args = (worker, incarnation, self.ttl_ms, "1" if admit else "0", *flat)
        reply = self._call("renew", *self._gate(), *args)
        if reply[0] == "unknown":
            return Renewed(known=False, taken_back=0)
        self.fill(worker, reply[2])
        missing = round(self.settings.renew_interval * 1000) if missing_ms is None else missing_ms
        if missing < 0 or reply[3:5] == ["0", "0"]:
            return Renewed(known=True, taken_back=0)
        taken_back = self.take_missing(worker, incarnation, holds, most_losses, missing)
        if taken_back and admit:
            self.fill(worker)
            self.place_all(taken_back)
        return Renewed(known=True, taken_back=len(taken_back))

    def unreported(self, workers: Sequence[str]) -> list[str]:
        """Those of the workers that have not opened their books in this epoch, in one round trip."""

        def ask() -> list[Any]:
            pipe = self.client.pipeline(transaction=False)
            for worker in workers:
                pipe.hget(keys.book(worker), "status")
            return pipe.execute()

        found = self._guard(ask)
        return [worker for worker, status in zip(workers, found, strict=True) if status in (None, b"closed")]

    def leave(self, worker: str, incarnation: str) -> int:
        """Close the book of a worker; returns what it still holds (0: it has left)."""
        reply = self._call("leave", *self._gate(), worker, incarnation)
        return int(reply[1]) if reply[0] == "held" else 0

    def condemn(self, worker: str, incarnation: str) -> None:
        """End the lease of an incarnation that is known to be dead."""
        self._call("condemn", *self._gate(), worker, incarnation)

    def lapsed_workers(self) -> list[str]:
        """The workers whose leases ran out, or end so late that the clock must have been set back since."""
        now = self.measure()
        found = self._guard(lambda: self.client.zrangebyscore(keys.LEASES, "-inf", now))
        found += self._guard(lambda: self.client.zrangebyscore(keys.LEASES, f"({now + self.ttl_ms}", "+inf"))
        return [item.decode() for item in found]

    # -- books ---------------------------------------------------------------------------------------------------

    def allocated_cpus(self) -> str | None:
        """`resource:allocated_cpus` as it stands."""
        found = self._guard(lambda: self.client.get(keys.ALLOCATED_CPUS))
        return found.decode() if found is not None else None
