"""Entry of jobs into the ledger: a job is admitted to a worker, or filed in the backlog."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.repair import Repairs
from celery_capacity.routing.ledger.replies import NEVER_AGAIN, Brought, Placed, Submitted, SubmitVerdict
from celery_capacity.routing.ledger.signatures import Reply
from celery_capacity.routing.model.envelope import digest_of
from celery_capacity.routing.model.request import Request, with_request
from celery_capacity.routing.policy.placement import held_by, is_last_chance
from celery_capacity.routing.policy.reservation import Reservation

#: Beginning of the value of a job that the ledger holds no more.
ENDED: Final = b"ended"
#: Shapes for which workers are looked for in one round trip: Redis takes at most 1 ms for each.
PLACED_AT_ONCE: Final = 5


class Admission(Repairs):
    """Scripts that bring jobs in or place them, one method each."""

    def _submit_values(
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
    ) -> dict[str, Any]:
        # The deadline counts from the moment when the row was read or written, by this process's clock. A pause since
        # then (a stopped process, a suspended machine) must not outlive the tombstone of a job that ended meanwhile.
        deadline = (self.now_ms() if read_ms is None else self.server_ms(read_ms)) + self.submit_limit_ms
        return {
            "deadline": deadline,
            "id": job,
            "shape": self.shape_held(shape, losses),
            "order": order,
            "message": message,
            "attempt": attempt,
            "losses": losses,
            "submitted": submitted_ms,
            "rerun": flag(rerun),
            "digest": digest_of(message),
        }

    def shape_held(self, shape: str, losses: int) -> str:
        """Return the shape that the next attempt of a job holds; `shape` may be that one already."""
        return shape_held(shape, losses, self.settings.most_losses)

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
        """Admit a job whose row is durable, or file it in the backlog.

        All workers are searched before the call returns. `shape`: the one under which the job is filed
        (`routing.model.request.filed_shape`). `read_ms`: the time at which the caller read or wrote the
        row, by its own clock (milliseconds); None means now. `rerun`: False where the first lost attempt ends the job.
        """
        return self.submit_one((job, shape, order, message, attempt, losses, submitted_ms, read_ms, rerun))

    def submit_one(self, row: tuple[Any, ...]) -> Submitted:
        """Submit one job, given as a row of `submit_many`."""
        values = self._submit_values(*row)
        return self._submitted(values["id"], values["shape"], self._call("submit", **values))

    def submit_many(self, rows: Sequence[tuple[Any, ...]]) -> int:
        """Submit many jobs in one step as `bring` does, and return how many the ledger took."""
        return self.bring(rows).taken

    def bring(self, rows: Sequence[tuple[Any, ...]]) -> Brought:
        """Submit many jobs in one step.

        Each row has the arguments of `submit`, in their order. The jobs that were neither taken nor left were in the
        ledger already. A call that came too late takes and leaves none.
        """
        if not rows:
            return Brought(0)
        jobs = [self._submit_values(*row) for row in rows]
        # The row that was read first has the earliest deadline.
        deadline = min(job.pop("deadline") for job in jobs)
        reply = self._call("submit_many", jobs, deadline=deadline)
        if reply.head == SubmitVerdict.LATE:
            self.hear(reply.number("now"))
            return Brought(0)
        for start in range(0, len(reply.rest), 3):
            # The worker that took the first job may have room for the next one, and stands before the cursor now.
            shape, *cursor = reply.rest[start : start + 3]
            while self.place_shape(shape, *cursor):
                cursor = []
        self.fill_freed(reply["passing"])
        return Brought(reply.number("taken"), tuple(map(int, filter(None, reply["left"].split(",")))))

    def begin_refill(self) -> dict[str, tuple[int, int | None]]:
        """Begin to fetch jobs that stay in Postgres: return the shapes whose heads run low, with the jobs they want.

        For each shape: the number of jobs, and the order before which they stand, None for any order. Call it before
        the rows are read: jobs that are left in Postgres later keep their place.
        """
        reply = self._call("begin_refill")
        rows = zip(reply.rest[::3], reply.rest[1::3], reply.rest[2::3], strict=True)
        return {shape: (int(jobs), int(before) if before else None) for shape, jobs, before in rows}

    def find_low(self) -> None:
        """Find shapes whose heads run low without a note for the runner of the duties: it was lost, or never made."""
        seen, looked = 0, 1
        while looked:
            looked = self._call("find_low", seen=seen).number("looked")
            seen += looked

    def refill(self, shape: str, next_order: int | None, rows: Sequence[tuple[Any, ...]]) -> int | None:
        """Bring in jobs of a shape that stayed in Postgres; return how many the shape wants after these.

        `rows`: as in `bring`. `next_order`: that of the first job which still stays there, None for none. Returns None
        where the rows were read too long ago.
        """
        return self.refill_heads([(shape, next_order, rows)])[0]

    def refill_heads(self, heads: Sequence[tuple[str, int | None, Sequence[tuple[Any, ...]]]]) -> list[int | None]:
        """Bring in jobs of several shapes in one round trip, each as in `refill`. Returns the answer of each."""
        replies = self._calls([self._prepared_refill(*head) for head in heads])
        answers: list[int | None] = []
        for reply in (self._reply("refill", values) for values in replies):
            late = reply.head == SubmitVerdict.LATE
            if late:
                self.hear(reply.number("now"))
            answers.append(None if late else reply.number("wanted"))
        self.place_shapes(shape for (shape, *_), answer in zip(heads, answers, strict=True) if answer is not None)
        return answers

    def _prepared_refill(
        self, shape: str, next_order: int | None, rows: Sequence[tuple[Any, ...]]
    ) -> tuple[str, list[Any]]:
        jobs = [self._submit_values(*row) for row in rows]
        deadline = min((job.pop("deadline") for job in jobs), default=self.now_ms() + self.submit_limit_ms)
        for job in jobs:
            del job["shape"]
        border = "" if next_order is None else next_order
        return self._prepared("refill", jobs, deadline=deadline, shape=shape, next_order=border)

    def borders(self) -> dict[str, int]:
        """Return the shapes of which jobs stay in Postgres, with an order before which none does."""
        rows: Any = self._guard(lambda: self.client.zrange(keys.BORDER, 0, -1, withscores=True))
        return {shape.decode(): int(order) for shape, order in rows}

    def count_staying(self, changes: Mapping[str, int], *, absolute: bool = False) -> None:
        """Count jobs of these shapes that stay in Postgres, for people: by changes, or by absolute numbers."""
        pipe = self.client.pipeline(transaction=absolute)
        if absolute:
            pipe.delete(keys.STAYING)
        for shape, number in changes.items():
            pipe.hincrby(keys.STAYING, shape, number)
        if changes or absolute:
            self._guard(pipe.execute)

    def unknown(self, jobs: Sequence[str]) -> list[str]:
        """Return those of these jobs that the ledger does not hold."""
        pipe = self.client.pipeline(transaction=False)
        for job in jobs:
            pipe.getrange(keys.job(job), 0, len(ENDED) - 1)
        states = self._guard(pipe.execute) if jobs else []
        return [job for job, state in zip(jobs, states, strict=True) if state in (b"", ENDED)]

    def memory(self) -> tuple[int, int, bool]:
        """Return the bytes that the server has used, its limit, and whether the ledger knows that memory is short.

        The limit is 0 where there is none, or where the server evicts keys instead of refusing writes.
        """
        pipe = self.client.pipeline(transaction=False)
        pipe.info("memory")
        pipe.hexists(keys.EPOCH, "tight")
        about, tight = self._guard(pipe.execute)
        limit = int(about.get("maxmemory", 0)) if about.get("maxmemory_policy") == "noeviction" else 0
        return int(about.get("used_memory", 0)), limit, bool(tight)

    def set_tight(self, tight: bool) -> None:
        """Note whether the memory of the server is short. Then only a few jobs of each shape wait in the ledger."""
        self._call("set_tight", tight="1" if tight else "0")

    def _submitted(self, job: str, shape: str, reply: Reply) -> Submitted:
        verdict = SubmitVerdict(reply.head)
        if verdict is SubmitVerdict.ADMITTED:
            return Submitted(verdict, worker=reply["worker"], attempt=reply.number("attempt"))
        if verdict is SubmitVerdict.LATE:
            self.hear(reply.number("now"))
            return Submitted(verdict)
        if verdict is SubmitVerdict.WAITING:
            cursor = reply["cursor_score"], reply["cursor_worker"]
            for placed in self.place_shape(shape, *cursor) if cursor[0] else ():
                if placed.job == job:
                    return Submitted(SubmitVerdict.ADMITTED, placed.worker, placed.attempt)
            self.fill_freed(reply["passing"])
            return Submitted(verdict)
        if verdict is SubmitVerdict.LEFT:
            return Submitted(verdict)
        return Submitted(verdict, was=reply["state"])

    def place_shape(self, shape: str, cursor_score: str = "", cursor_worker: str = "") -> list[Placed]:
        """Admit the waiting jobs of a shape to any workers that have room, until no job or no room is left."""
        (reply,) = self._ask_places([shape], cursor_score, cursor_worker)
        return self._place_on(shape, reply)

    def _place_on(self, shape: str, reply: Reply) -> list[Placed]:
        """Go on with a shape after the first reply about it."""
        placed: list[Placed] = []
        while True:
            self.fill_freed(reply["freed"])
            if reply.head == "none":
                return placed
            cursor = ("", "")
            if reply.head == "admitted":
                placed.append(Placed(reply["job"], reply["worker"], reply.number("attempt")))
            else:
                cursor = (reply["cursor_score"], reply["cursor_worker"])
            (reply,) = self._ask_places([shape], *cursor)

    def place_shapes(self, shapes: Iterable[str]) -> None:
        """Admit the waiting jobs of several shapes, after jobs of these shapes came back into the backlog.

        The first question about each goes with those about the others, since most shapes find no room.
        """
        names = list(dict.fromkeys(shapes))
        for start in range(0, len(names), PLACED_AT_ONCE):
            some = names[start : start + PLACED_AT_ONCE]
            for shape, reply in zip(some, self._ask_places(some), strict=True):
                self._place_on(shape, reply)

    def _ask_places(self, shapes: Sequence[str], cursor_score: str = "", cursor_worker: str = "") -> list[Reply]:
        calls = [
            self._prepared("place_shape", shape=shape, cursor_score=cursor_score, cursor_worker=cursor_worker)
            for shape in shapes
        ]
        return [self._reply("place_shape", values) for values in self._calls(calls)]

    def fill(self, worker: str, cursor: str = "-inf", pages: int | None = None) -> int:
        """Admit the waiting jobs that fit on a worker, and return how many were admitted.

        `cursor`: the place among the shapes to go on from; '' means that no shape is left. `pages`: the most pages of
        shapes to look at; None means no limit.
        """
        admitted = 0
        while cursor and pages != 0:
            pages = None if pages is None else pages - 1
            reply = self._call("fill", worker=worker, after=cursor)
            admitted += reply.number("admitted")
            self.fill_freed(reply["freed"])
            cursor = reply["cursor"]
        return admitted

    def reserve(self, reservation: Reservation, allocated: Mapping[str, int], reserved: Iterable[str]) -> bool:
        """Reserve a worker for the first job of a shape; return False where the books have changed.

        `allocated`: the allocations of the worker by which the caller judged. `reserved`: all workers that are reserved
        from now on.
        """
        reply = self._call(
            "reserve",
            worker=reservation.worker,
            shape=reservation.shape,
            order=reservation.order,
            at=reservation.at,
            since=reservation.since,
            beside=_amounts_text(reservation.beside),
            seen=_amounts_text(allocated),
            reserved=" ".join(reserved),
        )
        return reply.head == "ok"

    def unreserve(self, shape: str, reserved: Iterable[str]) -> str:
        """End the reservation for a shape, '' for none, and return the worker that is to be filled, '' for none.

        `reserved`: all workers that are reserved from now on; `NONE_YET` or `NONE_POSSIBLE` where there may be some.
        """
        return self._call("unreserve", shape=shape, reserved=" ".join(reserved))["freed"]

    def fill_freed(self, worker: str) -> None:
        """Fill a worker that was kept until now for another job, or that a new job passes to; '' means none."""
        if worker:
            self.fill(worker)


#: No worker is reserved. A script that files the first job of a request asks for a look at once.
NONE_YET: Final = ("", "")
#: No worker is reserved, though a job is blocked: its time is unknown. Only the look of each second may change that.
NONE_POSSIBLE: Final = ("", "", "")


def flag(rerun: bool) -> str:
    """Return the argument that tells a script whether a job may run again."""
    return "" if rerun else NEVER_AGAIN


def _amounts_text(amounts: Mapping[str, int]) -> str:
    return ",".join(f"{name}={amount}" for name, amount in sorted(amounts.items()) if amount > 0)


def shape_held(shape: str, losses: int, most_losses: int) -> str:
    """Return the shape that the next attempt of a job holds; `shape` may be that one already."""
    if not is_last_chance(losses, most_losses):
        return shape
    return with_request(shape, held_by(Request.from_shape(shape), losses, most_losses))
