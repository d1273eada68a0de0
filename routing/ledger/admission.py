"""How jobs come into the ledger: admitted to a worker, or filed in the backlog."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from celery_capacity.routing.ledger.repair import Repairs
from celery_capacity.routing.ledger.replies import NEVER_AGAIN, Placed, Submitted
from celery_capacity.routing.model.envelope import digest_of
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import held_by, is_last_chance


class Admission(Repairs):
    """The scripts, one method each."""

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
        shape = self.shape_held(shape, losses)
        last = (attempt, losses, submitted_ms, flag(rerun), digest_of(message))
        return (epoch, run_id, deadline, job, shape, order, message, *last)

    def shape_held(self, shape: str, losses: int) -> str:
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

    def place_all(self, shapes: Iterable[str]) -> None:
        """Admit what waits under several shapes, of which jobs have come back."""
        for shape in dict.fromkeys(shapes):
            self.place(shape)


def flag(rerun: bool) -> str:
    """Return how a script is told whether a job may run again."""
    return "" if rerun else NEVER_AGAIN
