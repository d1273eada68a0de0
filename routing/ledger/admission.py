"""Entry of jobs into the ledger: a job is admitted to a worker, or filed in the backlog."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from celery_capacity.routing.ledger.repair import Repairs
from celery_capacity.routing.ledger.replies import NEVER_AGAIN, Placed, Submitted, SubmitVerdict
from celery_capacity.routing.ledger.signatures import Reply
from celery_capacity.routing.model.envelope import digest_of
from celery_capacity.routing.model.request import Request, split_shape
from celery_capacity.routing.policy.placement import held_by, is_last_chance


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
            "job": job,
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
        """Return the shape that the next attempt of a job holds; `shape` may be that one already. Its task stays."""
        most = self.settings.most_losses
        if not is_last_chance(losses, most):
            return shape
        request, task = split_shape(shape)
        held = held_by(Request.from_shape(request), losses, most).shape
        return f"{held},{task}" if task else held

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
        return self._submitted(values["job"], values["shape"], self._call("submit", **values))

    def submit_many(self, rows: Sequence[tuple[Any, ...]]) -> int:
        """Submit many jobs in one step, and return how many the ledger took.

        Each row has the arguments of `submit`, in their order. The other jobs were in the ledger already. 0 may also
        mean that the whole call came too late.
        """
        if not rows:
            return 0
        jobs = [self._submit_values(*row) for row in rows]
        # The deadline is that of the row that was read first.
        deadline = min(job.pop("deadline") for job in jobs)
        reply = self._call("submit_many", jobs, deadline=deadline)
        if reply.head == SubmitVerdict.LATE:
            self.hear(reply.number("now"))
            return 0
        for start in range(0, len(reply.rest), 3):
            # The worker that took the first job may have room for the next one, and stands before the cursor now.
            shape, *cursor = reply.rest[start : start + 3]
            while self.place_shape(shape, *cursor):
                cursor = []
        return reply.number("taken")

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
            return Submitted(verdict)
        return Submitted(verdict, was=reply["state"])

    def place_shape(self, shape: str, cursor_score: str = "", cursor_worker: str = "") -> list[Placed]:
        """Admit the waiting jobs of a shape to any workers that have room, until no job or no room is left."""
        placed: list[Placed] = []
        while True:
            reply = self._call("place_shape", shape=shape, cursor_score=cursor_score, cursor_worker=cursor_worker)
            if reply.head == "none":
                return placed
            if reply.head == "admitted":
                placed.append(Placed(reply["job"], reply["worker"], reply.number("attempt")))
            else:
                cursor_score, cursor_worker = reply["cursor_score"], reply["cursor_worker"]

    def place_shapes(self, shapes: Iterable[str]) -> None:
        """Admit the waiting jobs of several shapes, after jobs of these shapes came back into the backlog."""
        for shape in dict.fromkeys(shapes):
            self.place_shape(shape)


def flag(rerun: bool) -> str:
    """Return the argument that tells a script whether a job may run again."""
    return "" if rerun else NEVER_AGAIN
