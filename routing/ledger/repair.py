"""Calls that make the ledger equal Postgres: compare many jobs in one step, repair single places, copy controls.

A script that writes nothing reports the differences. Another script repairs each of them, and checks once more before
it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from redis.exceptions import ResponseError

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.connection import LedgerServer
from celery_capacity.routing.ledger.replies import PlaceVerdict
from celery_capacity.routing.ledger.signatures import Group
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import SHAPES

#: Kind and key of each control in the ledger (lua/epoch/set_controls.lua).
CONTROLS: Final = {"cordon": keys.CORDONS, "pause": keys.PAUSED, "tenant": keys.TENANTS}

#: Amounts that one script compares.
USES: Final = 500


class Repairs(LedgerServer):
    """Scripts of reconcile, one method each."""

    def compare_jobs(self, rows: str) -> list[str]:
        """Return the jobs that differ between the ledger and Postgres, or stand elsewhere than their keys say.

        `rows`: one line for each job, with its id, state (`ended` where it is over), token, worker and order (`-` for
        none).
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

    def newest_entry(self) -> str:
        """Return the id of the newest entry that the stream has had, also when it is gone from there."""

        def read() -> str:
            try:
                info: Any = self.client.xinfo_stream(keys.STREAM)
            except ResponseError:
                # There is no stream.
                return "0-0"
            return str(info["last-generated-id"].decode())

        return str(self._guard(read))

    def set_use(self, amounts: Mapping[str, tuple[int, int]], newest: str) -> int:
        """Set what the jobs of tenants hold: `tenant/resource` -> (amount as read before the jobs, sum over the jobs).

        `newest`: the newest entry of the stream before anything was read. Where a job has ended since then, and where
        an amount has changed, all stays. Returns the number of amounts that were set.
        """
        groups = [{"field": field, "expected": read, "sum": total} for field, (read, total) in amounts.items()]
        pages = (groups[start : start + USES] for start in range(0, len(groups), USES))
        return sum(self._call("set_use", page, newest=newest).number("changed") for page in pages)

    def carried(self) -> set[str]:
        """Return the jobs that nobody may bring in, because the stream has their transitions of an older epoch."""
        jobs: Any = self._guard(lambda: self.client.smembers(keys.CARRIED))
        return {job.decode() for job in jobs}

    def unblock_carried(self, jobs: Sequence[tuple[str, Token, str, str]]) -> int:
        """Let carried jobs in again, whose entries Postgres has now, and return how many were carried until now.

        At most 200 jobs, each as its row is: id, token, state, and a mark. The mark is `1` where the job has
        ended, `held` where a worker has it, and empty otherwise.
        """
        rows = [{"job": job, **token.columns(), "state": state, "final": final} for job, token, state, final in jobs]
        return self._call("unblock_carried", rows).number("unblocked") if rows else 0

    # -- priorities ----------------------------------------------------------------------------------------------

    def reprioritize(self, jobs: Sequence[tuple[str, int, str]]) -> list[PlaceVerdict]:
        """Give jobs (id, order, shape under which it stays in Postgres) the places of their new orders."""
        verdicts: list[PlaceVerdict] = []
        for start in range(0, len(jobs), SHAPES):
            rows = [
                {"job": job, "order": number, "behind": behind} for job, number, behind in jobs[start : start + SHAPES]
            ]
            verdicts += map(PlaceVerdict, self._call("reprioritize", rows).rest)
        return verdicts

    # -- what operators hold back --------------------------------------------------------------------------------

    def controls_version(self) -> int | None:
        """Return the number of the newest action of an operator that the ledger has; None where it is cold."""
        version = self._guard(lambda: self.client.hget(keys.EPOCH, "controls"))
        return None if version is None else int(version)

    def controls(self) -> dict[tuple[str, str], str]:
        """Return the controls that the ledger has: (kind, name) -> value."""
        pipe = self.client.pipeline(transaction=True)
        for key in CONTROLS.values():
            pipe.hgetall(key)
        replies: Any = self._guard(pipe.execute)
        return {
            (kind, name.decode()): value.decode()
            for kind, fields in zip(CONTROLS, replies, strict=True)
            for name, value in fields.items()
        }

    def kept_workers(self) -> list[str]:
        """Return the workers that are kept for a job, by a reservation too."""
        workers: Any = self._guard(lambda: self.client.hvals(keys.KEYS["kept"]))
        return sorted({worker.decode() for worker in workers})

    def has_tenants(self) -> bool:
        """Return True while tenants are in use: one has a rule, or a job named one."""
        return bool(self._guard(lambda: self.client.hget(keys.EPOCH, "tenants")))

    def age_shares(self, totals: Mapping[str, int]) -> None:
        """Let the past use of tenants decay, and set the capacity of all workers, by resource."""
        self._call("age_shares", [{"resource": name, "amount": amount} for name, amount in totals.items()])

    def set_controls(self, version: int, changes: Mapping[tuple[str, str], str], *, last: bool) -> bool:
        """Change controls, "" taking one back; return False where the ledger has those of a newer version.

        `last`: the ledger has all controls of this version now.
        """
        reply = self._call("set_controls", control_groups(changes), version=version, last="1" if last else "0")
        return reply.head == "ok"

    def resume_shapes(self) -> int:
        """Let the shapes start again that no pause holds back any more, and return how many."""
        names, resumed = self._withheld(), 0
        for start in range(0, len(names), SHAPES):
            chunk = [{"shape": shape} for shape in names[start : start + SHAPES]]
            resumed += self._call("resume_shapes", chunk).number("resumed")
        return resumed

    def _withheld(self) -> list[str]:
        shapes: Any = self._guard(lambda: self.client.smembers(keys.WITHHELD))
        return sorted(shape.decode() for shape in shapes)


def control_groups(controls: Mapping[tuple[str, str], str]) -> Iterable[Group]:
    """Return controls, (kind, name) -> value, as arguments of a script."""
    return [{"kind": kind, "name": name, "value": value} for (kind, name), value in controls.items()]
