"""Hold back what an operator names: cordon and drain workers, pause parts of the backlog.

Each action is durable in Postgres before anything else. Then it is copied to the ledger, whose scripts obey it from
that step on. Where Postgres decides, workers read it with their next pull.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Connection, text

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, StoreUnavailable
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.identifiers import check_worker_name
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.recovery.controls import level
from celery_capacity.routing.store import claims, controls
from celery_capacity.routing.store.controls import MAX_OPERATOR, Cordon, Pause, tidy
from celery_capacity.workers.process.stores import Stores, transactions

#: Seconds for which a copy to the ledger is tried while the ledger is being opened. Later a duty copies.
APPLY_WITHIN: Final = 3.0
#: Seconds between two tries.
AGAIN_AFTER: Final = 0.05
#: Names that an error suggests.
SHOWN_NAMES: Final = 3


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """A worker that an operator cordoned, drained or let free. `applied`: False where the ledger does not have it yet.

    `cordon`: the order that holds now, None for none. `before`: True if the worker was cordoned before. `running`: jobs
    that it holds now. `live`: it has sent a heartbeat lately.
    """

    worker: str
    cordon: Cordon | None
    before: bool
    running: int
    live: bool
    applied: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "worker": self.worker,
            "status": "uncordoned" if self.cordon is None else self.cordon.status,
            "cordon": None if self.cordon is None else self.cordon.to_json(),
            "before": self.before,
            "running": self.running,
            "live": self.live,
            "applied": self.applied,
        }


@dataclass(frozen=True, slots=True)
class PauseOrder:
    """A part of the backlog that was paused or resumed. `before`: True if it was paused before."""

    scope: Scope
    pause: Pause | None
    before: bool
    applied: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.scope.kind.value,
            "name": self.scope.name,
            "paused": self.pause is not None,
            "pause": None if self.pause is None else self.pause.to_json(),
            "before": self.before,
            "applied": self.applied,
        }


def operator(by: str | None = None) -> str:
    """Return the name under which actions are noted: the given one, else user@host of this process."""
    if named := tidy(by, MAX_OPERATOR):
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in many containers
        user = "unknown"
    return tidy(f"{user}@{socket.gethostname()}", MAX_OPERATOR) or "unknown"


def cordon(
    stores: Stores,
    workers: Sequence[str],
    *,
    reason: str | None = None,
    by: str | None = None,
    drains: bool = False,
    deadline: float | None = None,
    stops: bool = False,
) -> list[WorkerOrder]:
    """Admit nothing more to these workers, also after a restart of theirs; running jobs go on.

    `drains`: the worker is to become empty; `deadline`: seconds after which its jobs are handed back, None lets them
    end.
    `stops`: its process ends once it is empty. Raises `InvalidRequest` for unknown names before anything is written,
    and `StoreUnavailable`.
    """
    names = list(dict.fromkeys(check_worker_name(worker) for worker in workers))
    with translated("nothing was cordoned: "), transactions(stores.engine).begin() as connection:
        controls.lock(connection)
        _check_known(connection, names)
        before = controls.cordons(connection)
        who, why = operator(by), tidy(reason)
        controls.cordon(connection, names, who, why, drains=drains, deadline=deadline, stops=stops)
    return _orders(stores, names, set(before))


def uncordon(stores: Stores, workers: Sequence[str], *, by: str | None = None) -> list[WorkerOrder]:
    """Admit jobs to these workers again, and at once those that wait and fit. Raises as `cordon`."""
    names = list(dict.fromkeys(check_worker_name(worker) for worker in workers))
    with translated("nothing was uncordoned: "), transactions(stores.engine).begin() as connection:
        controls.lock(connection)
        _check_known(connection, names)
        before = controls.uncordon(connection, names, operator(by))
    return _orders(stores, names, before)


def pause(stores: Stores, scope: Scope, *, reason: str | None = None, by: str | None = None) -> PauseOrder:
    """Start nothing more of a part of the backlog. Submissions are accepted and wait, and running jobs go on."""
    with translated("nothing was paused: "), transactions(stores.engine).begin() as connection:
        controls.lock(connection)
        before = any(existing.scope == scope for existing in controls.pauses(connection))
        controls.pause(connection, scope, operator(by), tidy(reason))
    applied = apply(stores)
    with translated(), stores.engine.connect() as connection:
        now = next((existing for existing in controls.pauses(connection) if existing.scope == scope), None)
    return PauseOrder(scope, now, before, applied)


def resume(stores: Stores, scope: Scope, *, by: str | None = None) -> PauseOrder:
    """Start a part of the backlog again: workers with room are filled at once."""
    with translated("nothing was resumed: "), transactions(stores.engine).begin() as connection:
        controls.lock(connection)
        before = controls.resume(connection, scope, operator(by))
    return PauseOrder(scope, None, before, apply(stores))


def apply(stores: Stores) -> bool:
    """Have the store that decides obey the newest actions; return False where a duty does so later."""
    ledger, end = stores.new_ledger(), time.monotonic() + APPLY_WITHIN
    try:
        while True:
            with translated(), stores.engine.connect() as connection:
                authority = read_authority(connection)
                claims.wake(connection)
            if authority.authority == Store.POSTGRES:
                return True
            ledger.epoch = authority.epoch
            try:
                level(stores.engine, ledger)
                return True
            except LedgerClosed:
                if time.monotonic() > end:
                    return False
                time.sleep(AGAIN_AFTER)
    except (StoreUnavailable, RedisError):
        return False
    finally:
        ledger.client.close()


_NAMES: Final = text("SELECT name FROM workers GROUP BY name ORDER BY max(seen_at) DESC LIMIT 10000")
_STANDING: Final = text("""
SELECT name, bool_or(status IN ('ready', 'draining') AND seen_at > now() - make_interval(secs => :ttl)),
  (SELECT count(*) FROM jobs j WHERE j.state IN ('admitted', 'running') AND j.worker = w.name)
FROM workers w WHERE name = ANY(CAST(:names AS text[])) GROUP BY name
""")


def worker_names(connection: Connection) -> list[str]:
    """Return the names that workers had or have an order for, as far as Postgres remembers, the newest first."""
    return list(dict.fromkeys([*connection.execute(_NAMES).scalars(), *controls.cordons(connection)]))


def unknown_worker(name: str, existing: Sequence[str]) -> InvalidRequest:
    """Return the error for a name that no worker has. It names those of the existing names that may be meant."""
    near = get_close_matches(name, existing, n=SHOWN_NAMES, cutoff=0.5)
    advice = f"The nearest: {', '.join(near)}." if near else "`celery -A platform cluster` lists the workers."
    return InvalidRequest(f"there is no worker {name}", value=name, advice=advice)


def _check_known(connection: Connection, names: Sequence[str]) -> None:
    """Raise `InvalidRequest` for a name that no worker ever had, as far as Postgres remembers."""
    existing = worker_names(connection)
    for name in names:
        if name not in existing:
            raise unknown_worker(name, existing)


def standing(connection: Connection, names: Sequence[str], ttl: float) -> dict[str, tuple[bool, int]]:
    """Return of each of these workers whether it lives, and the number of jobs that it holds by Postgres."""
    rows = connection.execute(_STANDING, {"names": list(names), "ttl": ttl})
    places = {name: (bool(live), int(jobs)) for name, live, jobs in rows}
    return {name: places.get(name, (False, 0)) for name in names}


def _orders(stores: Stores, names: Sequence[str], before: set[str]) -> list[WorkerOrder]:
    applied = apply(stores)
    with translated(), stores.engine.connect() as connection:
        now, places = controls.cordons(connection), standing(connection, names, stores.settings.worker_ttl)
    return [
        WorkerOrder(name, now.get(name), name in before, places[name][1], places[name][0], applied) for name in names
    ]
