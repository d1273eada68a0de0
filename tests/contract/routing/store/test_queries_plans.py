"""Statements that come with each job, and those of the duties: none reads a large table from end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

import pytest
from sqlalchemy import Connection, Engine, event

from celery_capacity.routing.fallback import reservation_rows, reservations
from celery_capacity.routing.fallback.reservations import Memory
from celery_capacity.routing.insert import bulk, replacements, retries
from celery_capacity.routing.inspect import job_lookup
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.states import State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.recovery import revocation
from celery_capacity.routing.store import backlog, claims, fencing, job_transitions, queries
from celery_capacity.routing.store.claims import Passing
from celery_capacity.routing.store.job_transitions import Transition

#: Rows by state. Most jobs have ended; many wait, and as many have a time that is to come.
ROWS: Final = {"succeeded": 120_000, "waiting": 50_000, "scheduled": 25_000, "running": 5_000}
_FILL: Final = """
INSERT INTO jobs (id, name, state, epoch, attempt, step, worker, incarnation, shape, request, queue, message, due_at,
  finished_at, expires_at)
SELECT '{state}-' || n, 'task', '{state}', 1, {attempt}, {step}, {worker}, {worker}, 'cpus=1000,slots=1', '{{}}',
  'celery', 'message', {due}, {finished}, CASE WHEN n % 10 = 0 AND {finished} IS NULL THEN now() + interval '1 day' END
FROM generate_series(1, {count}) n
"""
_ATTEMPTS: Final = """
INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, ended_at, outcome)
SELECT id, 1, 1, 'a', 'a', finished_at, CASE WHEN finished_at IS NOT NULL THEN 'succeeded' END
FROM jobs WHERE attempt = 1
"""
_ARCHIVED: Final = """
INSERT INTO jobs_archive (seq, id, name, state, epoch, attempt, losses, priority, request, declared, queue, retries,
  nesting, submitted_at, finished_at, message_bytes)
SELECT n + 1000000, 'old-' || n, 'task', 'succeeded', 1, 1, 0, 0, '{}', true, 'celery', 0, 0, now(), now(), 1
FROM generate_series(1, 50000) n;
INSERT INTO attempts_archive (job_seq, epoch, attempt, worker, incarnation, ended_at)
SELECT seq, 1, 1, 'a', 'a', now() FROM jobs_archive
"""


_WORKER: Final = """
INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, boot_id, version, started_at,
  seen_at)
VALUES ('life-7', 'life-7', 8000, 1, '{"cpus": 8, "slots": 8}', 'ready', 'h', 7, '', '0', now(), now())
"""


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for state, count in ROWS.items():
            held = state in ("running", "succeeded")
            step = {"running": Step.RUNNING, "succeeded": Step.ENDED, "waiting": Step.FILED}.get(state, Step.NONE)
            statement = _FILL.format(
                state=state,
                count=count,
                attempt=int(held),
                step=step.value,
                worker="'life-' || n % 100" if held else "NULL::text",
                due="now() + n * interval '1 second'" if state == "scheduled" else "NULL::timestamptz",
                finished="now() - n * interval '1 second'" if state == "succeeded" else "NULL::timestamptz",
            )
            connection.exec_driver_sql(statement.replace("%", "%%"))
        connection.exec_driver_sql(_ATTEMPTS)
        connection.exec_driver_sql(_ARCHIVED)
        connection.exec_driver_sql("UPDATE authority SET authority = 'postgres'")
        connection.exec_driver_sql(_WORKER)
        connection.exec_driver_sql("ANALYZE jobs, attempts, jobs_archive, attempts_archive")
        yield connection


def ends(number: int) -> list[Transition]:
    """Return the ends of so many running jobs: a batch of more than `FEW` is planned for its values."""
    return [
        Transition(f"running-{n}", Token(1, 1), "succeeded", Step.ENDED, "a", "a", 10, 20, 30, 0, "succeeded")
        for n in range(1, number + 1)
    ]


def bring(connection: Connection) -> None:
    jobs = [
        NewJob(f"new-{number}", "task", "cpus=1000,slots=1", b"{}", root_id=f"new-{number}") for number in range(1000)
    ]
    assert bulk.copy_jobs(connection, jobs)
    assert len(bulk.committed(connection, jobs).seqs) == 1000


GROUP: Final = backlog.AcceptedGroup("cpus=1000,slots=1", "task", 0, 0, 9, 1, 9)
#: Statements that run with each job, or time and again.
HOT: Final[dict[str, Callable[[Connection], object]]] = {
    "many rows are brought": bring,
    "due": lambda c: backlog.due(c, 1000),
    "stranded": lambda c: backlog.stranded(c, 10, 1000),
    "backlog": lambda c: backlog.backlog(c, 1000),
    "backlog, further on": lambda c: backlog.backlog(c, 1000, (0, 140_000)),
    "these": lambda c: backlog.these(c, ["waiting-7", "running-7"]),
    "unmarked": lambda c: backlog.unmarked(c, 1000),
    "marked as staying": lambda c: backlog.mark_behind(c, dict.fromkeys(map("waiting-{}".format, range(1, 900)), "a")),
    "fetched": lambda c: backlog.fetch(c, {"cpus=1000,slots=1": (100, None)}),
    "fetched before others": lambda c: backlog.fetch(c, {"cpus=1000,slots=1": (100, order(0, 1000))}),
    "fetched of many shapes": lambda c: backlog.fetch(c, {f"cpus={n},slots=1": (16, None) for n in range(64)}),
    "the next that stay": lambda c: backlog.next_orders(c, [f"cpus={n},slots=1" for n in range(64)]),
    "groups of accepted jobs": backlog.accepted_groups,
    "accepted jobs at a border": lambda c: backlog.accepted_between(c, [(GROUP, 7, 9)]),
    "accepted still": lambda c: backlog.still_accepted(c, ["waiting-7"]),
    "accepted": lambda c: backlog.accepted(c, ["waiting-7"]),
    "overdue": lambda c: backlog.overdue(c, 1000),
    "pull": lambda c: claims.candidates(c, 100),
    "pull, its reservation": lambda c: reservation_rows.holding_back(c, "life-7", 1, 3),
    "pull, beside the head": lambda c: claims.take(c, 1, "a", "a", ["waiting-7"], 3, Passing(datetime.now(UTC), {})),
    "reservations": lambda c: reservations.renew_reservations(c, Rules(), Memory(), 60.0, 3),
    "holders": lambda c: fencing.lock_holders(c, ["running-7", "running-8"]),
    "attempts of a worker": lambda c: claims.open_attempts(c, "life-7"),
    "ends, many": lambda c: job_transitions.apply(c, ends(500)),
    "locked rows": lambda c: job_transitions.free(c, [f"running-{n}" for n in range(1000)]),
    "an unfiled end": lambda c: backlog.end_unfiled(c, "scheduled-7", State.CANCELLED),
    "revoked": lambda c: list(revocation.still_open(c)),
    "what stands": lambda c: revocation.standing(c, ["waiting-7", "running-7"]),
    "abandoned replacements": replacements.end_abandoned,
    "an archived job": lambda c: queries.find(c, "old-7"),
    "an archived id": lambda c: retries.is_archived(c, "old-7"),
    "the beginning of an id": lambda c: job_lookup.with_prefix(c, "old-77"),
    "what stands, archived": lambda c: revocation.standing(c, ["old-7", "old-8"]),
}

#: Functions that plan their own statements.
FUNCTIONS: Final[dict[str, str]] = {
    "archive": "SELECT archive_finished(100000, 1000)",
    "a new gate": "SELECT gate_job('new', ARRAY['running-7', 'old-7', 'nowhere'], false, NULL)",
    "a rate": "SELECT open_rate('task', 5, '5', 1, 100)",
    "a key": "SELECT claim_key('key', 'waiting-7', 0), claim_key('key', 'waiting-8', 0)",
}
_NEW: Final = """
INSERT INTO jobs (id, name, state, shape, request, queue, message)
VALUES ('new', 'task', 'scheduled', 'cpus=1000,slots=1', '{}', 'celery', 'message')
"""
_ROWS_READ: Final = """
SELECT relname, seq_tup_read FROM pg_stat_xact_user_tables
WHERE relname ~ '^(jobs|attempts)' AND seq_tup_read > 0
"""


def test_hot_statement_reads_no_large_table_whole(connection: Connection, engine: Engine) -> None:
    statements: list[tuple[str, str, Any]] = []
    current = ""

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((current, statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        for what, ask in HOT.items():
            current = what
            ask(connection)
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert {what for what, *_ in statements} == HOT.keys()
    whole = []
    for what, statement, parameters in statements:
        cursor = connection.connection.cursor()
        cursor.execute(f"EXPLAIN {statement}", parameters)
        lines = "\n".join(row[0] for row in cursor.fetchall())
        if "Seq Scan on jobs" in lines or "Seq Scan on attempts" in lines:
            whole.append(f"{what}:\n{lines}")
    assert not whole, "\n".join(whole)


def test_move_looks_at_no_more_jobs_than_it_moves_without_statistics(connection: Connection) -> None:
    """Autovacuum comes once a minute: until then Postgres knows nothing about a new table, or one that grew."""
    ended = _FILL.format(
        state="succeeded", count=30_000, attempt=1, step=Step.ENDED.value, worker="'a'", due="NULL::timestamptz",
        finished="now() - n * interval '1 second'",
    )  # fmt: skip
    connection.exec_driver_sql("TRUNCATE jobs, attempts")
    connection.exec_driver_sql(ended.replace("%", "%%"))
    connection.exec_driver_sql(_ATTEMPTS)
    connection.exec_driver_sql("BEGIN")
    assert connection.exec_driver_sql("SELECT archive_finished(10, 1000)").scalar_one() == 1000
    looked = "SELECT idx_scan FROM pg_stat_xact_user_tables WHERE relname = 'attempts'"
    assert connection.exec_driver_sql(looked).scalar_one() < 3000
    connection.exec_driver_sql("ROLLBACK")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_hot_function_reads_no_large_table_whole(connection: Connection, function: str) -> None:
    connection.exec_driver_sql("BEGIN")
    connection.exec_driver_sql(_NEW)
    # Rows that the connection read before count until Postgres collects its statistics, once a second.
    before = connection.exec_driver_sql(_ROWS_READ).all()
    connection.exec_driver_sql(FUNCTIONS[function])
    assert connection.exec_driver_sql(_ROWS_READ).all() == before
    connection.exec_driver_sql("ROLLBACK")
