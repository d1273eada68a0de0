"""Rows of workers, and the declarations of tasks, in Postgres."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, text

from celery_capacity.routing.config.process_identity import PidSpace
from celery_capacity.routing.database.authority import SELECT_AUTHORITY, Authority, authority_of
from celery_capacity.routing.errors import NotMigrated
from celery_capacity.routing.model.states import WorkerStatus


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """The data that a worker publishes. `cpus` in millicores, `memory` in bytes, `capacity` in people's units."""

    name: str
    incarnation: str
    cpus: int
    memory: int
    capacity: Mapping[str, Any]
    hostname: str
    pid: int
    pid_space: PidSpace
    #: Clock ticks from the boot to the start of its main process; None where they are unknown.
    start_ticks: int | None
    version: str
    started_at: str
    #: Its labels, by key. They are written, and not read here.
    labels: Mapping[str, str] = field(default_factory=dict)


#: The columns of a `WorkerRow`, in the order of `_row`.
_COLUMNS: Final = (
    "name, incarnation, cpus, memory, capacity, hostname, pid, machine_id, boot_id, start_ticks, version, "
    "started_at::text"
)


def _row(columns: Sequence[Any]) -> WorkerRow:
    name, incarnation, cpus, memory, capacity, hostname, pid, machine, boot, ticks, version, started_at = columns[:12]
    # An older release noted no machine: its process is not looked up.
    pid_space = PidSpace(machine or "", "" if machine is None else boot)
    return WorkerRow(name, incarnation, cpus, memory, capacity, hostname, pid, pid_space, ticks, version, started_at)


_SEEN: Final = text(f"""
WITH seen AS (
INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, machine_id, boot_id, start_ticks,
                     version, started_at, seen_at, ledger_lost_at, ends_at, labels)
VALUES (:incarnation, :name, :cpus, :memory, CAST(:capacity AS jsonb), :status, :hostname, :pid, :machine_id, :boot_id,
        :start_ticks, :version, CAST(:started_at AS timestamptz), now(), CASE WHEN :lost THEN now() END,
        now() + make_interval(secs => CAST(:left AS float)), CAST(:labels AS jsonb))
ON CONFLICT (incarnation) DO UPDATE SET seen_at = now(), status = excluded.status, cpus = excluded.cpus,
  memory = excluded.memory, capacity = excluded.capacity, left_at = NULL, ends_at = excluded.ends_at,
  labels = excluded.labels,
  ledger_lost_at = CASE WHEN :lost THEN coalesce(workers.ledger_lost_at, now()) END)
SELECT a.*, {_COLUMNS} FROM ({SELECT_AUTHORITY}) AS a (epoch, authority, changed, age)
LEFT JOIN workers ON status = 'lost' AND machine_id = :machine_id AND boot_id = :boot_id AND incarnation <> :incarnation
""")


def see_worker(
    connection: Connection,
    worker: WorkerRow,
    status: WorkerStatus,
    *,
    ledger_lost: bool = False,
    left_ms: int | None = None,
) -> tuple[Authority, list[WorkerRow]]:
    """Note that a worker lives, its capacity, and whether it has lost the ledger.

    `left_ms`: milliseconds until it ends, None where no end is known.

    Return the authority, and the given-up workers of its pid space: they may have left processes there. Raises
    `NotMigrated` where the authority has no row.
    """
    rows = connection.execute(
        _SEEN,
        {
            "incarnation": worker.incarnation,
            "name": worker.name,
            "cpus": worker.cpus,
            "memory": worker.memory,
            "capacity": json.dumps(dict(worker.capacity)),
            "status": status,
            "hostname": worker.hostname,
            "pid": worker.pid,
            "machine_id": worker.pid_space.machine,
            "boot_id": worker.pid_space.boot,
            "start_ticks": worker.start_ticks,
            "version": worker.version,
            "started_at": worker.started_at,
            "lost": ledger_lost,
            "left": None if left_ms is None else left_ms / 1000,
            "labels": json.dumps(dict(worker.labels)),
        },
    ).all()
    if not rows:
        raise NotMigrated()
    return authority_of(rows[0][:4]), [_row(row[4:]) for row in rows if row[4] is not None]


def end_worker(connection: Connection, incarnation: str, status: WorkerStatus) -> None:
    """Note that a worker left or was lost. An end that was noted before stays."""
    connection.execute(
        text(
            "UPDATE workers SET status = :status, left_at = now() WHERE incarnation = :incarnation "
            "AND status IN ('ready', 'draining')"
        ),
        {"status": status, "incarnation": incarnation},
    )


def revive_worker(connection: Connection, incarnation: str) -> None:
    """Note that a worker that was given up lives after all."""
    revived = "UPDATE workers SET status = 'ready', left_at = NULL WHERE incarnation = :incarnation AND status = 'lost'"
    connection.execute(text(revived), {"incarnation": incarnation})


def end_former_incarnations(connection: Connection, name: str, incarnation: str) -> None:
    """Note that every other incarnation of a name is over: this incarnation has the name now."""
    connection.execute(
        text(
            "UPDATE workers SET status = 'lost', left_at = now() WHERE name = :name AND incarnation <> :incarnation "
            "AND status IN ('ready', 'draining')"
        ),
        {"name": name, "incarnation": incarnation},
    )


def find_worker(connection: Connection, incarnation: str) -> WorkerRow | None:
    """Return the row of an incarnation of a worker; None where Postgres does not know it."""
    row = connection.execute(
        text(f"SELECT {_COLUMNS} FROM workers WHERE incarnation = :incarnation"), {"incarnation": incarnation}
    ).one_or_none()
    return _row(row) if row is not None else None


@dataclass(frozen=True, slots=True)
class Namesake:
    """Another incarnation of a name.

    `seen`: its last heartbeat in Postgres, seconds since 1970. `age`: seconds since then by Postgres's clock. `over`:
    Postgres knows it as lost.
    """

    worker: WorkerRow
    seen: float
    age: float
    over: bool


_NAMESAKES: Final = text(f"""
SELECT {_COLUMNS}, extract(epoch FROM seen_at)::float, extract(epoch FROM clock_timestamp() - seen_at)::float,
       status = 'lost'
FROM workers WHERE name = :name AND incarnation <> :incarnation
  AND (status IN ('ready', 'draining') OR incarnation = :holder
       OR (status = 'lost' AND machine_id = :machine AND boot_id = :boot))
""")


def namesakes(connection: Connection, name: str, incarnation: str, pid_space: PidSpace, holder: str) -> list[Namesake]:
    """Return the other incarnations of a name that may still run.

    They are those that never left, the holder of the ledger's book, and those of this pid space that were given up.
    """
    rows = connection.execute(
        _NAMESAKES,
        {
            "name": name,
            "incarnation": incarnation,
            "machine": pid_space.machine,
            "boot": pid_space.boot,
            "holder": holder,
        },
    )
    return [Namesake(_row(row), *row[12:]) for row in rows]


def live_workers(connection: Connection, seen_for: float) -> list[tuple[str, str]]:
    """Return (name, incarnation) of workers that have not left and were seen in the last `seen_for` seconds."""
    rows = connection.execute(
        text(
            "SELECT name, incarnation FROM workers WHERE status IN ('ready', 'draining') "
            "AND seen_at > now() - make_interval(secs => :seen_for) ORDER BY name"
        ),
        {"seen_for": seen_for},
    )
    return [(row[0], row[1]) for row in rows]


def silent_workers(connection: Connection, beyond: float) -> dict[str, float]:
    """Return the incarnations of workers that never left and were not seen for `beyond` seconds, with their last time.

    The value of each incarnation is its last heartbeat in Postgres, in seconds since 1970.
    """
    rows = connection.execute(
        text(
            "SELECT incarnation, extract(epoch FROM seen_at)::float FROM workers WHERE status IN ('ready', 'draining') "
            "AND seen_at <= now() - make_interval(secs => :beyond) ORDER BY name"
        ),
        {"beyond": beyond},
    )
    return {row[0]: row[1] for row in rows}


_ON_MACHINE: Final = text("""
SELECT DISTINCT name FROM workers
WHERE status IN ('ready', 'draining') AND split_part(boot_id, ':', 1) = split_part(:boot_id, ':', 1) AND name <> :name
  AND seen_at > now() - make_interval(secs => :seen_for)
ORDER BY name
""")


def live_on_machine(connection: Connection, boot_id: str, name: str, seen_for: float) -> list[str]:
    """Return the names of other workers on this boot of a machine that were seen in the last `seen_for` seconds."""
    rows = connection.execute(_ON_MACHINE, {"boot_id": boot_id, "name": name, "seen_for": seen_for})
    return [str(row[0]) for row in rows]


_DECLARE: Final = text("""
INSERT INTO declarations (name, request, options, seen_at)
SELECT name, CAST(request AS jsonb), CAST(options AS jsonb), now()
FROM unnest(CAST(:names AS text[]), CAST(:requests AS text[]), CAST(:options AS text[])) AS d (name, request, options)
ON CONFLICT (name) DO UPDATE SET request = excluded.request, options = excluded.options, seen_at = now()
""")


class DeclarationRow(NamedTuple):
    """The declaration of a task: its request in people's units, and its other options, None where it has none."""

    request: dict[str, Any]
    options: dict[str, Any] | None


def declare(
    connection: Connection, requests: Mapping[str, Mapping[str, Any]], options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Store the requests that tasks declare, by task name, in people's units, and the options of some of them."""
    names = sorted(requests)
    connection.execute(
        _DECLARE,
        {
            "names": names,
            "requests": [json.dumps(dict(requests[name])) for name in names],
            "options": [json.dumps(dict(options[name])) if name in options else None for name in names],
        },
    )


def declarations(connection: Connection) -> dict[str, DeclarationRow]:
    """Return all declarations, by task name."""
    rows = connection.execute(text("SELECT name, request, options FROM declarations"))
    return {row[0]: DeclarationRow(row[1], row[2]) for row in rows}
