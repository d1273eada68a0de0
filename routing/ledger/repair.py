"""What reconcile asks of the ledger: to compare many jobs in one step, and to make one place right.

Whatever differs is told by a script that writes nothing, and repaired by one that checks once more.
"""

from __future__ import annotations

from celery_capacity.routing.ledger.connection import LedgerServer


class Repairs(LedgerServer):
    """The scripts, one method each."""

    def compare(self, rows: str) -> list[str]:
        """The jobs of which the ledger says something else than Postgres, or that do not stand where their keys say.
        `rows`: a line a job, with its id, state (`ended` where it is over), token and worker (`-` for none)."""
        return self._call("compare", rows=rows).rest

    def misplaced(self, shape: str, seen: int, most: int) -> tuple[int, list[str]]:
        """How many places of a shape's queue were looked at, before the last `seen` ones and at most `most`, and the
        jobs that have one of them and do not wait there."""
        reply = self._call("misplaced", shape=shape, seen=seen, most=most)
        return reply.number("looked"), reply.rest

    def mend(self, shape: str, job: str = "", seen_in: str = "") -> bool:
        """Make the queue of a shape right about one job, and the indexes about its first job (that of the resource in
        which it was seen, too); True when something differed."""
        return self._call("mend", shape=shape, job=job, seen=seen_in)["differed"] == "1"

    def unlist(self, resource: str, seen: int, most: int) -> tuple[int, int]:
        """Take out of the index of a resource whoever does not belong there, among `most` places behind the first
        `seen` ones; how many were looked at, and how many taken out."""
        reply = self._call("unlist", resource=resource, seen=seen, most=most)
        return reply.number("looked"), reply.number("taken")

    def seat(self, job: str) -> int | None:
        """Make the places of one job right; how many differed, or None where its worker has no book."""
        reply = self._call("seat", job=job)
        return reply.number("differed") if reply.head == "ok" else None

    def set_total(self, expected: int | None, total: int) -> bool:
        """Set the sum of allocated millicores, unless it changed since it was read as `expected` (None: missing)."""
        return self._call("total", expected="" if expected is None else expected, sum=total).head == "ok"
