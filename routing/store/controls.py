"""Orders of operators, durable in Postgres: cordons of workers, pauses, priorities of jobs, and the log of all of them.

Postgres has the truth, and the ledger a copy (`routing.recovery.controls`). Each change takes one lock, for its
transaction. So the numbers of actions are in the order of their commits, and the newest number is the version of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.database import tenants
from celery_capacity.routing.errors import storable
from celery_capacity.routing.model.amounts import CPUS, cpus_number
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.routing.policy.pauses import Kind, Scope, scopes_of
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, Rule

#: Key of the advisory lock of changes and of copies to the ledger: "controls" in ASCII.
_LOCK: Final = int.from_bytes(b"controls")
_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))
#: Characters of a reason, and of the name of an operator, that are kept.
MAX_REASON: Final = 500
MAX_OPERATOR: Final = 200


@dataclass(frozen=True, slots=True)
class Cordon:
    """A worker to which nothing more is admitted.

    `drains`: it is to become empty. `drain_by`: what runs there at this time is handed back; None lets it end.
    `stops`: its process ends once it is empty.
    """

    worker: str
    by: str
    since: datetime
    reason: str | None
    drains: bool = False
    drain_by: datetime | None = None
    stops: bool = False

    @property
    def status(self) -> str:
        """Return the word for the worker's status."""
        return "draining" if self.drains else "cordoned"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "since": iso(self.since), "drain_by": iso(self.drain_by)}


@dataclass(frozen=True, slots=True)
class Pause:
    """A part of the backlog of which nothing starts."""

    scope: Scope
    by: str
    since: datetime
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        kind, name = self.scope
        return {"kind": kind.value, "name": name, "by": self.by, "since": iso(self.since), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Orders:
    """The pauses, and the cordons by the names of their workers."""

    pauses: tuple[Pause, ...] = ()
    cordons: tuple[Cordon, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "pauses": [pause.to_json() for pause in self.pauses],
            "cordons": [cordon.to_json() for cordon in self.cordons],
        }


@dataclass(frozen=True, slots=True)
class Controls:
    """Everything that is held back, as of one moment. `version`: number of the newest action, 0 for none."""

    version: int
    cordons: Mapping[str, Cordon]
    pauses: tuple[Pause, ...]
    rules: Mapping[str, Rule]


def iso(moment: datetime | None) -> str | None:
    """Return a time in ISO 8601, in UTC."""
    return None if moment is None else moment.astimezone(UTC).isoformat(timespec="milliseconds")


def lock(connection: Connection) -> None:
    """Keep all others from changing controls, and from copying them to the ledger, until the transaction ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


_VERSION: Final = "SELECT coalesce(max(seq), 0) FROM operator_actions"
_CORDONS: Final = "SELECT worker, made_by, made_at, reason, drains, drain_by, stops FROM cordons"
_PAUSES: Final = "SELECT kind, name, made_by, made_at, reason FROM pauses"


def version(connection: Connection) -> int:
    """Return the number of the newest action, 0 where there was none."""
    return int(connection.execute(text(_VERSION)).scalar_one())


def read(connection: Connection) -> Controls:
    """Return everything that is held back. The version is read first: what is newer than it is copied again."""
    newest = version(connection)
    return Controls(newest, cordons(connection), pauses(connection), tenants.tenant_rules(connection))


def cordons(connection: Connection) -> dict[str, Cordon]:
    """Return all cordons, by worker."""
    return {row[0]: Cordon(*row) for row in connection.execute(text(f"{_CORDONS} ORDER BY worker"))}


def cordon_of(connection: Connection, worker: str) -> tuple[Cordon | None, float | None]:
    """Return the cordon of a worker, None for none, and the seconds until its jobs are handed back, None for never."""
    remaining = "extract(epoch FROM drain_by - clock_timestamp())::float"
    statement = text(_CORDONS.replace(" FROM", f", {remaining} FROM") + " WHERE worker = :worker")
    row = connection.execute(statement, {"worker": worker}).one_or_none()
    return (None, None) if row is None else (Cordon(*row[:7]), row[7])


def is_cordoned(connection: Connection, worker: str) -> bool:
    """Return True if nothing may be admitted to a worker."""
    statement = text("SELECT EXISTS (SELECT FROM cordons WHERE worker = :worker)")
    return bool(connection.execute(statement, {"worker": worker}).scalar_one())


_HOLDS: Final = text("SELECT EXISTS (SELECT FROM jobs WHERE state IN ('admitted', 'running') AND worker = :worker)")


def holds(connection: Connection, worker: str) -> bool:
    """Return True if a worker holds a job, by Postgres."""
    return bool(connection.execute(_HOLDS, {"worker": worker}).scalar_one())


def note_stop(connection: Connection, worker: str) -> None:
    """Note that the process of a drained worker ends: the next one of this name is to stay."""
    connection.execute(text("UPDATE cordons SET stops = false WHERE worker = :worker"), {"worker": worker})


def pauses(connection: Connection) -> tuple[Pause, ...]:
    """Return all pauses: that of the platform first, then by name."""
    rows = connection.execute(text(f"{_PAUSES} ORDER BY kind <> 'platform', kind, name"))
    return tuple(Pause(Scope(Kind(kind), name), *rest) for kind, name, *rest in rows)


def pause_of(connection: Connection, queue: str, task: str, tenant: str) -> Pause | None:
    """Return a pause that holds back jobs of a queue, a task and a tenant, the widest one; None for none."""
    by_scope = {pause.scope: pause for pause in pauses(connection)}
    return next((by_scope[scope] for scope in scopes_of(queue, task, tenant) if scope in by_scope), None)


# -- tenants


def people_of(amounts: Mapping[str, int]) -> dict[str, int | float]:
    """Return amounts in the units of people, zeros included: a quota may be none of a resource."""
    return {name: cpus_number(amount) if name == CPUS else amount for name, amount in sorted(amounts.items())}


_SET_TENANT: Final = text("""
INSERT INTO tenants (name, weight, nominal, quota, max_waiting, made_by)
VALUES (:name, :weight, CAST(:nominal AS jsonb), CAST(:quota AS jsonb), :max_waiting, :by)
ON CONFLICT (name) DO UPDATE SET weight = excluded.weight, nominal = excluded.nominal, quota = excluded.quota,
  max_waiting = excluded.max_waiting, made_by = excluded.made_by, made_at = clock_timestamp()
""")


def set_tenant(connection: Connection, name: str, rule: Rule, by: str) -> None:
    """Make a rule of a tenant. A rule that is there is replaced."""
    nominal, quota = people_of(rule.nominal), people_of(rule.quota)
    values = {"weight": rule.weight, "nominal": nominal, "quota": quota, "max_waiting": rule.max_waiting}
    stored = {**values, "name": name, "by": by, "nominal": json.dumps(nominal), "quota": json.dumps(quota)}
    connection.execute(_SET_TENANT, stored)
    log(connection, "tenant", [f"tenant:{name}"], by, None, values)


def remove_tenant(connection: Connection, name: str, by: str) -> bool:
    """Remove the rule of a tenant, whose jobs go on with the defaults; return False where there was none."""
    removed = connection.execute(text("DELETE FROM tenants WHERE name = :name"), {"name": name}).rowcount == 1
    log(connection, "remove-tenant", [f"tenant:{name}"] if removed else [], by)
    return removed


#: Condition on a row of `jobs`: no pause holds it back.
NOT_PAUSED: Final = f"""NOT EXISTS (SELECT FROM pauses p WHERE p.kind = 'platform'
  OR (p.kind = 'queue' AND p.name = jobs.queue) OR (p.kind = 'task' AND p.name = jobs.name)
  OR (p.kind = 'tenant' AND p.name = coalesce({tenants.OF_TENANT}, '{DEFAULT_TENANT}')))"""


# -- changes: each in a transaction of the caller, behind `lock`


_CORDON: Final = text("""
INSERT INTO cordons (worker, made_by, reason, drains, drain_by, stops)
SELECT worker, :by, :reason, :drains, clock_timestamp() + make_interval(secs => CAST(:deadline AS float)), :stops
FROM unnest(CAST(:workers AS text[])) AS w (worker)
ON CONFLICT (worker) DO UPDATE SET made_by = excluded.made_by, made_at = excluded.made_at, reason = excluded.reason,
  drains = excluded.drains, drain_by = excluded.drain_by, stops = excluded.stops
""")


def cordon(
    connection: Connection,
    workers: Sequence[str],
    by: str,
    reason: str | None,
    *,
    drains: bool = False,
    deadline: float | None = None,
    stops: bool = False,
) -> None:
    """Cordon workers, or drain them. A cordon that is there is replaced. `deadline`: seconds until the hand-back."""
    values = {"drains": drains, "deadline": deadline, "stops": stops}
    connection.execute(_CORDON, {"workers": list(workers), "by": by, "reason": reason, **values})
    details = {"deadline_seconds": deadline, "stop": stops} if drains else None
    log(connection, "drain" if drains else "cordon", workers, by, reason, details)


def uncordon(connection: Connection, workers: Sequence[str], by: str) -> set[str]:
    """Take back cordons; return the workers that had one."""
    statement = text("DELETE FROM cordons WHERE worker = ANY(CAST(:workers AS text[])) RETURNING worker")
    freed = set(connection.execute(statement, {"workers": list(workers)}).scalars())
    log(connection, "uncordon", sorted(freed), by)
    return freed


_PAUSE: Final = text("""
INSERT INTO pauses (kind, name, made_by, reason) VALUES (:kind, :name, :by, :reason)
ON CONFLICT (kind, name) DO UPDATE SET made_by = excluded.made_by, made_at = excluded.made_at, reason = excluded.reason
""")


def pause(connection: Connection, scope: Scope, by: str, reason: str | None) -> None:
    """Pause a part of the backlog. A pause that is there is replaced."""
    connection.execute(_PAUSE, {"kind": scope.kind.value, "name": scope.name, "by": by, "reason": reason})
    log(connection, "pause", [target_of(scope)], by, reason)


def resume(connection: Connection, scope: Scope, by: str) -> bool:
    """Take back a pause; return False where there was none."""
    statement = text("DELETE FROM pauses WHERE kind = :kind AND name = :name")
    done = connection.execute(statement, {"kind": scope.kind.value, "name": scope.name}).rowcount == 1
    log(connection, "resume", [target_of(scope)] if done else [], by)
    return done


def target_of(scope: Scope) -> str:
    """Return a scope as the log of actions names it: platform, queue:NAME, task:NAME or tenant:NAME."""
    return f"{scope.kind.value}:{scope.name}" if scope.name else scope.kind.value


_LOG: Final = text("""
INSERT INTO operator_actions (action, target, made_by, reason, details)
SELECT :action, target, :by, :reason, CAST(:details AS jsonb) FROM unnest(CAST(:targets AS text[])) AS t (target)
""")


def log(
    connection: Connection,
    action: str,
    targets: Iterable[str],
    by: str,
    reason: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Note an action of an operator, once for each of its targets."""
    described = None if details is None else json.dumps(dict(details))
    values = {"action": action, "targets": list(targets), "by": by, "reason": reason, "details": described}
    connection.execute(_LOG, values)


# -- priorities


@dataclass(frozen=True, slots=True)
class Ranked:
    """A job with its new priority.

    `before`: the former one. `behind`: the shape under which it waits in Postgres. `due`: its time has come.
    """

    job: str
    state: State
    before: int
    priority: int
    seq: int
    behind: str | None
    due: bool = False

    @property
    def order(self) -> int:
        """Return the number by which the backlog is sorted."""
        return order(self.priority, self.seq)


_SET: Final = text(f"""
WITH x AS (
  SELECT id, priority AS before FROM jobs WHERE id = ANY(CAST(:ids AS text[])) AND state NOT IN ({_FINAL})
  ORDER BY id FOR NO KEY UPDATE
)
UPDATE jobs SET priority = :priority, reprioritized = true FROM x WHERE jobs.id = x.id
RETURNING jobs.id, state, x.before, jobs.priority, seq, behind, coalesce(due_at <= clock_timestamp(), false)
""")


def set_priority(connection: Connection, ids: Sequence[str], priority: int) -> dict[str, Ranked]:
    """Give jobs a priority that their retries keep; return those that have not ended, by id."""
    rows = connection.execute(_SET, {"ids": list(ids), "priority": priority})
    return {row[0]: Ranked(row[0], State(row[1]), *row[2:]) for row in rows}


_THESE: Final = text("""
SELECT id, state, priority, priority, seq, behind, coalesce(due_at <= clock_timestamp(), false) FROM jobs
WHERE id = ANY(CAST(:ids AS text[]))
""")


def ranked(connection: Connection, ids: Sequence[str]) -> dict[str, Ranked]:
    """Return these jobs as their rows are, by id."""
    rows = connection.execute(_THESE, {"ids": list(ids)})
    return {row[0]: Ranked(row[0], State(row[1]), *row[2:]) for row in rows}


def tidy(value: str | None, most: int = MAX_REASON) -> str | None:
    """Return a text of an operator in a form that both stores can hold, of a longer one its beginning; None for ""."""
    return storable(value.strip(), most) or None if value else None
