"""The ledger: the books in Redis, and one typed method for each script that reads or changes them.

A method checks nothing that its script checks: the script decides. A method returns a value. Where the ledger cannot
act, it raises `LedgerClosed` (cold, or of another epoch than the caller's) or `StoreUnavailable`. The client itself
retries nothing: the scripts are idempotent, so the caller decides.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import RedisError

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.election import Elections
from celery_capacity.routing.ledger.held_jobs import Held
from celery_capacity.routing.ledger.replies import (
    Arrived,
    Cancelled,
    CancelVerdict,
    Ended,
    Filled,
    Released,
    ReleaseVerdict,
    Renewed,
    Settled,
    Settling,
    Taken,
    claims,
    hand_overs,
)
from celery_capacity.routing.ledger.scripts import MAX_BATCH
from celery_capacity.routing.ledger.signatures import Group, Reply
from celery_capacity.routing.line import RESP, Line
from celery_capacity.routing.model.envelope import digest_of
from celery_capacity.routing.model.request import task_text
from celery_capacity.routing.model.states import State, WorkerStatus
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.labels import labels_text

#: Messages that one script delivers again, so that admission never waits long for it.
REDELIVER_CHUNK: Final = 100
#: Hexadecimal digits in the name of a catalogue of tasks.
CATALOGUE_DIGITS: Final = 16
#: Pages of shapes that are tried after a release: 1,024 shapes that the worker may take. Where more wait, the heartbeat
#: tries all of them.
RELEASE_PAGES: Final = 15


class Ledger(Held, Elections):
    """All scripts of the ledger, one method each.

    The scripts that bring jobs in are in `routing.ledger.admission`. The scripts that go through the jobs of a worker
    are in `routing.ledger.held_jobs`, and the scripts that only reconcile uses are in `routing.ledger.repair`.
    """

    # -- jobs ----------------------------------------------------------------------------------------------------

    def settle(
        self,
        worker: str,
        incarnation: str,
        *,
        ended: Sequence[Ended] = (),
        arrived: Sequence[Arrived] = (),
        most_losses: int,
        admit: bool = True,
        nonce: str = "",
        follow: bool = True,
    ) -> Settled:
        """Release the attempts that ended, and claim the attempts whose messages arrived, in one round trip.

        With a `nonce` of its own, the worker takes the jobs that the release admits to it from the reply, claimed
        already. Without `follow`, the caller calls `follow` itself, once it holds the jobs that were handed over.
        """
        settling = self.prepare_settle(
            worker, incarnation, ended=ended, arrived=arrived, most_losses=most_losses, admit=admit, nonce=nonce
        )
        settled = self._settled(settling, self._calls(settling.calls) if settling.calls else [])
        if follow:
            self.follow(worker, settled)
        return settled

    def prepare_settle(
        self,
        worker: str,
        incarnation: str,
        *,
        ended: Sequence[Ended] = (),
        arrived: Sequence[Arrived] = (),
        most_losses: int,
        admit: bool = True,
        nonce: str = "",
    ) -> Settling:
        """Return the calls of a `settle`, for `send_settle`."""
        calls: list[tuple[str, list[Any]]] = []
        caller = {"worker": worker, "incarnation": incarnation}
        if ended:
            may = {"most_losses": most_losses, "admit": "1" if admit else "0", "nonce": nonce}
            calls.append(self._prepared("release", map(_end_values, ended), **caller, **may))
        if arrived:
            calls.append(self._prepared("claim", map(_claim_values, arrived), **caller))
        return Settling(ended, arrived, admit, calls)

    def open_line(self) -> Line | None:
        """Return a connection of its own for `send_settle`, None where the server is reached by TLS or in RESP 3."""
        pool: Any = self.client.connection_pool
        # Not by `make_connection`: the pool counts what it makes for ever, and makes no more than 100 connections.
        connection: Any = pool.connection_class(**pool.connection_kwargs)
        self._guard(connection.connect)
        if type(connection._sock) is socket.socket and int(connection.get_protocol()) == RESP:
            return Line(connection)
        connection.disconnect()
        return None

    def send_settle(self, line: Line, settling: Settling) -> None:
        """Send a `settle`, and do not wait for its reply."""
        settling.meant, self._meant.run_id = getattr(self._meant, "run_id", ""), ""
        commands = [("EVALSHA", self._scripts[name].sha, 0, *args) for name, args in settling.calls]
        self._on_line(lambda: line.send(commands))

    def receive_settled(self, line: Line, settling: Settling) -> Settled | None:
        """Read the reply to a `send_settle`; return None if more of it is to come. Raises the errors of `settle`.

        A server that does not know a script says so in an error, and one that was full too. Then `settle` is the way.
        """
        replies = self._on_line(line.receive)
        if replies is None:
            return None
        for reply in replies:
            if isinstance(reply, RedisError):
                raise self._translated(reply)
        return self._settled(settling, self._checked(settling.meant, replies))

    def _on_line(self, action: Callable[[], Any]) -> Any:
        try:
            return self._guard(action)
        except OSError as error:
            raise self._translated(Disconnected(str(error))) from error

    def _settled(self, settling: Settling, replies: Sequence[list[str]]) -> Settled:
        settled = Settled([], [], [])
        for (name, _), values in zip(settling.calls, replies, strict=True):
            if name == "release":
                self._released(settling.ended, self._reply(name, values), settled, settling.admit)
            else:
                settled.claimed.extend(claims(settling.arrived, self._reply(name, values).rest))
        return settled

    def _released(self, ended: Sequence[Ended], reply: Reply, settled: Settled, admit: bool) -> None:
        for index, end in enumerate(ended):
            verdict, state, entry, shape = reply.rest[4 * index : 4 * index + 4]
            release = Released(end, ReleaseVerdict(verdict), State(state) if state else None, entry)
            settled.released.append(release)
            if admit and release.verdict is ReleaseVerdict.RELEASED and release.state is State.WAITING:
                settled.shapes.append(shape)
        settled.handed_over.extend(hand_overs(reply.rest[4 * len(ended) :]))
        settled.cursors.append(reply["cursor"])
        settled.freed.append(reply["freed"])
        settled.shapes.extend(reply["unheld"].splitlines())

    def follow(self, worker: str, settled: Settled) -> None:
        """Go on after a release: place shapes that came back or that a quota holds no more, and fill from cursors."""
        self.place_shapes(settled.shapes)
        for cursor in settled.cursors:
            self.fill(worker, cursor, RELEASE_PAGES)
        for freed in settled.freed:
            self.fill_freed(freed)

    def find_room(self) -> Iterator[tuple[str, str]]:
        """Yield each waiting shape that may have room, with a worker that has room for its first job.

        The worker is "" where the search left out some workers, or where a worker is to be kept for a job that runs
        alone.
        """
        cursor, done = "", False
        while not done:
            reply = self._call("find_room", after=cursor)
            yield from zip(reply.rest[::2], reply.rest[1::2], strict=True)
            cursor = reply["cursor"]
            done = not cursor

    def cancel(self, job: str, state: State, error: str = "") -> Cancelled:
        """End a waiting job as `cancelled`, `expired` or `failed`."""
        reply = self._call("cancel", id=job, state=state, error_text=error)
        verdict = CancelVerdict(reply.head)
        if verdict is CancelVerdict.HELD:
            return Cancelled(verdict, worker=reply["worker"])
        if verdict is not CancelVerdict.ENDED:
            return Cancelled(verdict)
        self.fill_freed(reply["freed"])
        return Cancelled(verdict, entry=reply["entry"])

    def revoke(self, job: str) -> bool:
        """Note that a job held by a worker was revoked; return False where no worker holds it."""
        return self._call("revoke", id=job).head == "held"

    def note_successor(self, job: str, message: bytes) -> bool:
        """Note that a successor of the running attempt, with this message, is in Postgres."""
        return self._call("note_successor", id=job, digest=digest_of(message)).head == "ok"

    def count(self, what: str) -> None:
        """Add one to a counter now, for a process that may call nothing more."""
        self._guard(lambda: self.client.hincrby(keys.COUNTERS, what, 1))

    def note_reconcile(self, drift: int) -> None:
        """Note for people that a reconcile has ended now, and count the differences that it found."""
        if drift:
            self._guard(lambda: self.client.hincrby(keys.COUNTERS, "drift", drift))
        self._guard(lambda: self.client.set(keys.RECONCILED, self.now_ms()))

    def ack_transitions(self, entries: Sequence[tuple[str, str]]) -> int:
        """Drop stream entries (entry, job) that Postgres has, and return how many were dropped."""
        dropped = 0
        for start in range(0, len(entries), MAX_BATCH):
            rows = [{"entry": entry, "job": job} for entry, job in entries[start : start + MAX_BATCH]]
            dropped += self._call("ack_transitions", rows).number("dropped")
        return dropped

    def redeliver(self) -> int:
        """Deliver again the messages of jobs that were not claimed in time, and return how many messages went out."""
        delivered = 0
        while True:
            reply = self._call("redeliver", most=REDELIVER_CHUNK)
            delivered += reply.number("delivered")
            if reply.number("looked") < REDELIVER_CHUNK:
                return delivered

    def remove_job(self, job: str, token: Token, *, final: bool) -> bool:
        """Take out a job, unless it changed since it was read; `final`: the job may not come back."""
        reply = self._call("remove_job", id=job, token=str(token), final="1" if final else "0")
        if reply.head != "ok":
            return False
        self.fill_freed(reply["freed"])
        return True

    # -- workers -------------------------------------------------------------------------------------------------

    def register(
        self,
        worker: str,
        incarnation: str,
        queue: str,
        capacity: str,
        view: Mapping[str, str],
        status: WorkerStatus = WorkerStatus.READY,
        *,
        tasks: Collection[str] | None = None,
        left_ms: int | None = None,
        labels: Mapping[str, str] | None = None,
        admit: bool = True,
    ) -> Filled | Taken:
        """Open a worker's book, or return `Taken` where the name belongs to another incarnation.

        `capacity` has the form of a shape. `tasks`: names of the tasks that the worker has registered, None where it
        takes any. `left_ms`: milliseconds until the worker ends, None where no end is known. `labels`: by key. With the
        status `closed`,
        nothing is admitted before the next `renew`. Without `admit`, this caller admits nothing.
        """
        names = " ".join(sorted(map(task_text, tasks or ())))
        catalogue = "" if tasks is None else hashlib.sha256(names.encode()).hexdigest()[:CATALOGUE_DIGITS]
        reply = self._counted(
            "register",
            _view_values(view),
            worker=worker,
            incarnation=incarnation,
            queue=queue,
            ttl=self.ttl_ms,
            capacity=capacity,
            tasks=catalogue,
            names=names,
            status=status,
            left="" if left_ms is None else left_ms,
            labels=labels_text(labels or {}),
        )
        if reply.head == "taken":
            return Taken(reply["incarnation"], reply.number("lease_left"), reply.number("held"))
        return Filled(self.fill(worker) if admit else 0)

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
        """Renew the lease, with a list of the jobs that the worker holds.

        `known` of the reply is False where the worker must register again. Without `admit` nothing is admitted: this
        caller may not. `missing_ms`: a running job that no list has named for so many milliseconds of the ledger's
        clock is taken back. None means a renew interval, 0 means at once, a negative value means never.
        """
        reply = self._call("renew", _view_values(view), worker=worker, incarnation=incarnation, ttl=self.ttl_ms)
        if reply.head == "unknown":
            return Renewed(known=False, taken_back=0)
        if admit and reply["undone"] == "1":
            self.fill(worker)
        missing = round(self.settings.renew_interval * 1000) if missing_ms is None else missing_ms
        if missing < 0 or (reply["held"], reply["lacked"]) == ("0", "0"):
            return Renewed(known=True, taken_back=0)
        taken_back = self.take_back_missing(worker, incarnation, holds, most_losses, missing)
        if taken_back and admit:
            self.fill(worker)
            self.place_shapes(taken_back)
        return Renewed(known=True, taken_back=len(taken_back))

    def unreported(self, workers: Sequence[str]) -> list[str]:
        """Return the workers that have not opened their books in this epoch, in one round trip."""

        def ask() -> list[Any]:
            pipe = self.client.pipeline(transaction=False)
            for worker in workers:
                pipe.hget(keys.book(worker), "status")
            return pipe.execute()

        statuses, closed = self._guard(ask), WorkerStatus.CLOSED.encode()
        return [worker for worker, status in zip(workers, statuses, strict=True) if status in (None, closed)]

    def leave(self, worker: str, incarnation: str) -> int:
        """Close the book of a worker, and return the number of jobs that it still holds (0: the worker has left)."""
        reply = self._call("leave", worker=worker, incarnation=incarnation)
        return reply.number("number") if reply.head == "held" else 0

    def expire_lease(self, worker: str, incarnation: str) -> None:
        """End the lease of an incarnation that is known to be dead."""
        self._call("expire_lease", worker=worker, incarnation=incarnation)

    def lapsed_workers(self) -> list[str]:
        """Return the workers whose leases ran out, or end so late that the clock must have been set back since."""
        now = self.measure()
        names = self._guard(lambda: self.client.zrangebyscore(keys.LEASES, "-inf", now))
        names += self._guard(lambda: self.client.zrangebyscore(keys.LEASES, f"({now + self.ttl_ms}", "+inf"))
        return [name.decode() for name in names]

    # -- books ---------------------------------------------------------------------------------------------------

    def allocated_cpus(self) -> str | None:
        """Return the value of the key `resource:allocated_cpus`, None where the key is missing."""
        value = self._guard(lambda: self.client.get(keys.ALLOCATED_CPUS))
        return value.decode() if value is not None else None


def _end_values(end: Ended) -> Group:
    return {
        "job": end.job,
        "token": str(end.token),
        "outcome": end.outcome,
        "error": (end.error or "").encode("utf-8", "replace"),
        "outbox": end.outbox,
        "told": "1" if end.told else "",
        "results": [dict(zip(("key", "seconds", "result"), result, strict=True)) for result in end.results],
    }


def _claim_values(message: Arrived) -> Group:
    return {"job": message.job, "token": str(message.token), "nonce": message.nonce, "digest": message.digest}


def _view_values(view: Mapping[str, str]) -> list[Group]:
    return [{"name": name, "value": value} for name, value in view.items()]
