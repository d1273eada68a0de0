"""The ledger: the books in Redis, and one typed method for each script that reads or changes them.

A method checks nothing that its script checks: the script is the decision. What it returns is a value; when the
ledger cannot act it raises `LedgerClosed` (cold, or of another epoch than the caller's) or `StoreUnavailable`.
Nothing is sent a second time by the client itself: the scripts are idempotent, so the caller decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from routing import keys
from routing.election import Elections
from routing.envelope import digest_of
from routing.policy import held_by, is_last_chance
from routing.repairs import Repairs
from routing.replies import (
    NEVER_AGAIN,
    Adopted,
    Cancelled,
    Ended,
    Filled,
    HandedOver,
    Lapsed,
    Placed,
    Released,
    Renewed,
    Settled,
    Submitted,
    Taken,
    claims,
    hand_overs,
)
from routing.request import Request

#: Most jobs that one lapse call takes back, so that admission never waits long for it.
LAPSE_CHUNK: Final = 100
REDELIVER_CHUNK: Final = 100
#: Pages of shapes that follow a release: 1,024 that the worker may take. Where more wait, the heartbeat looks at all.
RELEASE_PAGES: Final = 15


class Ledger(Repairs, Elections):
    """The scripts, one method each; those that reconcile alone uses are in `routing.repairs`."""

    # -- jobs ----------------------------------------------------------------------------------------------------

    def _submit_args(
        self,
        job: str,
        shape: str,
        order: int,
        message: bytes,
        attempt: int,
        losses: int,
        submitted_ms: int,
        read_ms: float | None = None,
        rerun: bool = True,
    ) -> tuple[Any, ...]:
        epoch, run_id = self._gate()
        # Counted from when the row was read or written, by this process's clock: a pause since then (a stopped process,
        # a suspended machine) must not outlive the tombstone of a job that has ended meanwhile.
        deadline = (self.now_ms() if read_ms is None else self.server_ms(read_ms)) + self.submit_within_ms
        shape = self._held(shape, losses)
        last = (attempt, losses, submitted_ms, _flag(rerun), digest_of(message))
        return (epoch, run_id, deadline, job, shape, order, message, *last)

    def _held(self, shape: str, losses: int) -> str:
        """The shape of what the next attempt of a job holds; it may be given already."""
        most = self.settings.most_losses
        return held_by(Request.from_shape(shape), losses, most).shape if is_last_chance(losses, most) else shape

    def submit(
        self,
        job: str,
        shape: str,
        order: int,
        message: bytes,
        *,
        attempt: int = 0,
        losses: int = 0,
        submitted_ms: int = 0,
        read_ms: float | None = None,
        rerun: bool = True,
    ) -> Submitted:
        """Admit a job whose row is durable, or file it; looks on among all workers before it returns.

        `read_ms`: when the caller read or wrote the row, by its own clock (milliseconds); now where it is None.
        `rerun`: False where its first lost attempt ends it.
        """
        return self.submit_one((job, shape, order, message, attempt, losses, submitted_ms, read_ms, rerun))

    def submit_one(self, row: tuple[Any, ...]) -> Submitted:
        """The same, with a row of `submit_many`."""
        args = self._submit_args(*row)
        return self._submitted(args[3], args[4], self._call("submit", *args))

    def submit_many(self, rows: Sequence[tuple[Any, ...]]) -> int:
        """The same for many jobs in one step; rows as the arguments of `submit`, in their order. How many were taken:
        the others were known, or all came too late."""
        if not rows:
            return 0
        calls = [self._submit_args(*row) for row in rows]
        # The three that stand first are those of the caller; the deadline is that of the row that was read first.
        args: list[Any] = [*calls[0][:2], min(call[2] for call in calls)]
        for call in calls:
            args += call[3:]
        reply = self._call("submit_many", *args)
        if reply[0] == "late":
            self.hear(int(reply[1]))
            return 0
        for start in range(2, len(reply), 3):
            # Whoever took the first may have room for the next one, and stands before the cursor now.
            shape, *cursor = reply[start : start + 3]
            while self.place(shape, *cursor):
                cursor = []
        return int(reply[1])

    def _submitted(self, job: str, shape: str, reply: list[str]) -> Submitted:
        if reply[0] == "admitted":
            return Submitted("admitted", worker=reply[1], attempt=int(reply[2]))
        if reply[0] == "late":
            self.hear(int(reply[1]))
            return Submitted("late")
        if reply[0] == "waiting":
            placed = self.place(shape, reply[1], reply[2]) if reply[1] else []
            own = next((one for one in placed if one.job == job), None)
            return Submitted("admitted", own.worker, own.attempt) if own else Submitted("waiting")
        return Submitted(reply[0], was=reply[1] if len(reply) > 1 else None)

    def place(self, shape: str, cursor_score: str = "", cursor_worker: str = "") -> list[Placed]:
        """Admit what waits under a shape to any workers that have room, until none is found."""
        placed: list[Placed] = []
        while True:
            reply = self._call("place", *self._gate(), shape, cursor_score, cursor_worker)
            if reply[0] == "none":
                return placed
            if reply[0] == "admitted":
                placed.append(Placed(job=reply[1], worker=reply[2], attempt=int(reply[3])))
            else:
                cursor_score, cursor_worker = reply[1], reply[2]

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
                args += (end.outbox, len(end.results))
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
        for shape in dict.fromkeys(settled.shapes):
            self.place(shape)
        for cursor in settled.cursors:
            self.fill(worker, cursor, RELEASE_PAGES)

    def recover(self, worker: str, incarnation: str, holds: Iterable[str]) -> list[HandedOver]:
        """What this worker was handed over and does not hold, because a reply was lost."""
        reply = self._call("recover", *self._gate(), worker, incarnation, *holds)
        return hand_overs(reply[1:])

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
        args = (worker, incarnation, queue, self._ttl_ms, capacity, status, "1" if admit else "0", *flat)
        reply = self._call("register", *self._gate(), *args)
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
        missing = round(self.settings.renew_interval * 1000) if missing_ms is None else missing_ms
        args = (worker, incarnation, self._ttl_ms, most_losses, "1" if admit else "0", missing, len(flat), *flat)
        reply = self._call("renew", *self._gate(), *args, *holds)
        if reply[0] == "unknown":
            return Renewed(known=False, taken_back=0)
        self.fill(worker, reply[2])
        for shape in dict.fromkeys(reply[3:]) if admit else ():
            self.place(shape)
        return Renewed(known=True, taken_back=len(reply) - 3)

    def reserve(self, worker: str, incarnation: str, capacity: str) -> bool:
        """A closed book for a worker that has not spoken in this epoch; False when it has."""
        return self._call("reserve", *self._gate(), worker, incarnation, capacity)[0] == "ok"

    def unreported(self, workers: Sequence[str]) -> list[str]:
        """Those of the workers that have not opened their books in this epoch, in one round trip."""

        def ask() -> list[Any]:
            pipe = self.client.pipeline(transaction=False)
            for worker in workers:
                pipe.hget(keys.book(worker), "status")
            return pipe.execute()

        found = self._guard(ask)
        return [worker for worker, status in zip(workers, found, strict=True) if status in (None, b"closed")]

    def drain(self, worker: str, incarnation: str) -> int:
        """Admit nothing more there; returns how many jobs were handed back."""
        reply = self._call("drain", *self._gate(), worker, incarnation)
        for shape in dict.fromkeys(reply[1:]):
            self.place(shape)
        return len(reply) - 1

    def leave(self, worker: str, incarnation: str) -> int:
        """Close the book of a worker; returns what it still holds (0: it has left)."""
        reply = self._call("leave", *self._gate(), worker, incarnation)
        return int(reply[1]) if reply[0] == "held" else 0

    def condemn(self, worker: str, incarnation: str) -> None:
        """End the lease of an incarnation that is known to be dead."""
        self._call("condemn", *self._gate(), worker, incarnation)

    def lapse(self, worker: str, grace_ms: int, most_losses: int, most: int = LAPSE_CHUNK) -> Lapsed:
        """Close a worker whose lease ran out; take its jobs back once `grace_ms` are over too, so many at a time (0:
        only say that it is `due`)."""
        taken = 0
        while True:
            reply = self._call("lapse", *self._gate(), worker, grace_ms, most_losses, most)
            if reply[0] in ("more", "gone"):
                taken += len(reply) - 2
                for shape in dict.fromkeys(reply[2:]):
                    self.place(shape)
            if reply[0] != "more":
                return Lapsed(reply[0], incarnation=reply[1] if len(reply) > 1 else None, taken_back=taken)

    def lapsed_workers(self) -> list[str]:
        """The workers whose leases ran out."""
        found = self._guard(lambda: self.client.zrangebyscore(keys.LEASES, "-inf", self.measure()))
        return [item.decode() for item in found]

    def adopt(self, worker: str, incarnation: str, held: Sequence[Adopted]) -> list[str]:
        """Enter what a worker holds since an older epoch; returns the jobs that are no longer its own."""
        args: list[Any] = [*self._gate(), worker, incarnation]
        for one in held:
            args += (
                one.job,
                one.token,
                self._held(one.shape, one.losses),
                one.order,
                one.admitted_ms,
                one.started_ms,
                one.nonce,
                one.losses,
                _flag(one.rerun),
            )
        reply = self._call("adopt", *args)
        if reply[0] == "unknown":
            return [one.job for one in held]
        return [one.job for one, verdict in zip(held, reply[1:], strict=True) if verdict != "adopted"]

    @property
    def _ttl_ms(self) -> int:
        return round(self.settings.worker_ttl * 1000)

    # -- books ---------------------------------------------------------------------------------------------------

    def allocated_cpus(self) -> str | None:
        """`resource:allocated_cpus` as it stands."""
        found = self._guard(lambda: self.client.get(keys.ALLOCATED_CPUS))
        return found.decode() if found is not None else None


def _flag(rerun: bool) -> str:
    return "" if rerun else NEVER_AGAIN
