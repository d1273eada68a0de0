"""Calls of reconcile to the ledger: compare many jobs in one step, and repair single places.

A script that writes nothing reports the differences. Another script repairs each of them, and checks once more before
it does.
"""

from __future__ import annotations

from celery_capacity.routing.ledger.connection import LedgerServer


class Repairs(LedgerServer):
    """Scripts of reconcile, one method each."""

    def compare_jobs(self, rows: str) -> list[str]:
        """Return the jobs that differ between the ledger and Postgres, or stand elsewhere than their keys say.

        `rows`: one line for each job, with its id, state (`ended` where it is over), token and worker (`-` for none).
        """
        return self._call("compare_jobs", rows=rows).rest

    def find_misplaced(self, shape: str, seen: int, most: int) -> tuple[int, list[str]]:
        """Return the number of places looked at in a shape's queue, and the jobs that do not belong in theirs.

        The script looks at no more than `most` places, before the last `seen` ones.
        """
        reply = self._call("find_misplaced", shape=shape, seen=seen, most=most)
        return reply.number("looked"), reply.rest

    def repair_queue(self, shape: str, job: str = "", seen_in: str = "") -> bool:
        """Repair the queue of a shape for one job, and the indexes of shapes for its first job.

        `seen_in`: the resource in whose index the shape was seen; that index is repaired too. Returns True where
        something differed.
        """
        return self._call("repair_queue", shape=shape, id=job, seen=seen_in)["differed"] == "1"

    def prune_index(self, resource: str, seen: int, most: int) -> tuple[int, int]:
        """Take workers that do not belong there out of the index of a resource.

        The script looks at no more than `most` places, behind the first `seen` ones. Returns the number of places
        looked at, and the number of workers taken out.
        """
        reply = self._call("prune_index", resource=resource, seen=seen, most=most)
        return reply.number("looked"), reply.number("taken")

    def repair_job(self, job: str) -> int | None:
        """Repair the places of one job, and return how many differed, or None where its worker has no book."""
        reply = self._call("repair_job", id=job)
        return reply.number("differed") if reply.head == "ok" else None

    def set_waiting(self, expected: int, waiting: int) -> bool:
        """Set the number of jobs that wait in the ledger, unless it changed since it was read as `expected`."""
        return self._call("set_waiting", expected=expected, sum=waiting).head == "ok"

    def set_total(self, expected: int | None, total: int) -> bool:
        """Set the sum of allocated millicores, unless it changed since it was read as `expected` (None: missing)."""
        return self._call("set_total", expected="" if expected is None else expected, sum=total).head == "ok"
