"""The right to a worker's name: no live worker may have it.

An incarnation that this machine can prove to be dead is passed over at once: by its pid, or by the lock that it gave up
(`workers.supervision.lock_file`), since a container numbers its processes anew at each start. All others are
challenged, and given up only after silence for the rest of their lease. Another boot, another host name or another pid
proves nothing: clones and containers share the names. An incarnation that gives any sign that it runs meanwhile is a
second worker of that name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Engine

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.errors import NameTaken
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.snapshot import text
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.store import worker_rows
from celery_capacity.routing.store.worker_rows import WorkerRow
from celery_capacity.workers.membership import orphans
from celery_capacity.workers.process.identity import Identity, is_known_dead
from celery_capacity.workers.supervision.lock_file import LockFile

logger = logging.getLogger(__name__)

#: Share of the TTL within which a live worker answers a challenge (3 s at the usual 60).
CHALLENGE_SHARE: Final = 0.05
#: Renew intervals within which a live worker is seen in Postgres while that decides. Nobody answers challenges then.
SEEN_INTERVALS: Final = 1.5
#: Seconds between two looks at the stores.
LOOK_EVERY: Final = 0.1


@dataclass(frozen=True, slots=True)
class Claimant:
    """Another incarnation that may have the name.

    `lease`: end of its lease (ms of the ledger's clock), None without a book that it registered. `seen`: its heartbeat
    in Postgres. `left`: remaining seconds of its lease, by the store's clock.
    """

    worker: WorkerRow | None
    lease: int | None
    seen: float | None
    left: float

    def spoke_since(self, before: Claimant | None) -> bool:
        """Return True if the incarnation gave a sign since an earlier look. None: it was not there then."""
        if before is None:
            return self.lease is not None
        return (self.lease is not None and self.lease != before.lease) or self.seen != before.seen

    def is_as(self, before: Claimant | None) -> bool:
        """Return True if nothing changed since an earlier look at the incarnation."""
        return before is not None and (self.lease, self.seen) == (before.lease, before.seen)


class NameClaim:
    """Claim of a worker to its name. Calls block; they belong to the thread that joins."""

    def __init__(self, engine: Engine, ledger: Ledger, identity: Identity) -> None:
        self._engine = engine
        self._ledger = ledger
        self._identity = identity
        self.lock = LockFile(ledger.settings.lock_dir, identity.incarnation, identity.pid_space.boot)
        #: Claimants that were silent for the whole time, so that nobody waits for them again.
        self._given_up: dict[str, Claimant] = {}

    def take(self, challenge: Callable[[], None] | None) -> None:
        """Return once no live worker has the name, and nothing runs for it on this machine. Raises `NameTaken`.

        `challenge` asks every worker for a heartbeat. None: the ledger is gone, and only Postgres is looked at.
        """
        # The lock comes first: nobody may find this incarnation in a store without it.
        self.lock.hold()
        first: dict[str, Claimant] = {}
        pause = threading.Event()
        began = answer_by = 0.0
        warned = False
        while True:
            claimants, rows = self._look(with_ledger=challenge is not None)
            claimants = {
                incarnation: claimant
                for incarnation, claimant in claimants.items()
                if not claimant.is_as(self._given_up.get(incarnation))
            }
            if not claimants:
                break
            if not first:
                first, began = claimants, time.monotonic()
                answer_by = began + self._answer_time(challenge is not None)
                if challenge is not None:
                    challenge()
            for incarnation, claimant in claimants.items():
                if claimant.spoke_since(first.get(incarnation)):
                    raise self.taken(incarnation)
            waited = time.monotonic() - began
            if time.monotonic() >= answer_by:
                # By this process's own clock too, since the clock of a store may be set back meanwhile.
                left = min(max(claimant.left for claimant in claimants.values()), self._ttl - waited)
                if left <= 0:
                    self._given_up |= claimants
                    break
                if not warned:
                    warned = True
                    logger.warning(
                        "worker %s is registered and silent; waiting for its lease to run out (%.0f s)",
                        self._identity.name,
                        left,
                    )
            pause.wait(LOOK_EVERY)
        # These are the rows of this look alone: an incarnation that came after it was not judged.
        orphans.end_predecessors(rows, self._identity.pid_space)

    def is_over(self, row: WorkerRow) -> bool:
        """Return True only if another incarnation is certainly over: no process has its pid, or its lock."""
        return is_known_dead(row, self._identity.pid_space) or self.lock.proves_end(row)

    def taken(self, incarnation: str) -> NameTaken:
        """Return the error for a name that this other incarnation has."""
        with self._engine.connect() as connection:
            row = worker_rows.find_worker(connection, incarnation)
        where = f"pid {row.pid} on {row.hostname}" if row is not None else f"incarnation {incarnation}"
        return NameTaken(
            f"a live worker is named {self._identity.name} already ({where})",
            value=self._identity.name,
            advice="Give this one another name: NODE_NAME=... or -n NAME@%h.",
        )

    @property
    def _ttl(self) -> float:
        return self._ledger.settings.worker_ttl

    def _answer_time(self, with_ledger: bool) -> float:
        """Return the seconds within which a live claimant gives a sign that it runs."""
        with self._engine.connect() as connection:
            authority = read_authority(connection).authority
        if with_ledger and authority == Store.LEDGER:
            return self._ttl * CHALLENGE_SHARE
        return min(self._ttl, self._ledger.settings.renew_interval * SEEN_INTERVALS)

    def _look(self, *, with_ledger: bool) -> tuple[dict[str, Claimant], list[WorkerRow]]:
        """Return the incarnations not known to be dead, and the rows of all that may have left processes behind."""
        holder, lease = self._holder() if with_ledger else ("", None)
        identity, claimants = self._identity, dict[str, Claimant]()
        with self._engine.connect() as connection:
            rows = worker_rows.namesakes(connection, identity.name, identity.incarnation, identity.pid_space, holder)
        lease_left = 0.0 if lease is None else (lease - self._ledger.now_ms()) / 1000
        incarnations = {row.worker.incarnation for row in rows}
        if holder and holder not in incarnations:
            claimants[holder] = Claimant(None, lease, None, lease_left)
        for row in rows:
            worker = row.worker
            if self.is_over(worker):
                continue
            if worker.incarnation == holder and lease is not None:
                claimants[holder] = Claimant(worker, lease, row.seen, lease_left)
            else:
                claimants[worker.incarnation] = Claimant(
                    worker, None, row.seen, 0.0 if row.over else self._ttl - row.age
                )
        return claimants, [row.worker for row in rows]

    def _holder(self) -> tuple[str, int | None]:
        """Return the other incarnation that has the name's book, "" without one, and the end of its lease (ms).

        A book that was only reserved, for an incarnation that has not registered in this epoch, has no lease.
        """
        fields = ("incarnation", "lease", "queue")
        incarnation, lease, queue = self._ledger.client.hmget(keys.book(self._identity.name), *fields)
        if incarnation is None or text(incarnation) == self._identity.incarnation:
            return "", None
        return text(incarnation), int(lease) if lease and queue else None
