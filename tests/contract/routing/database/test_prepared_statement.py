"""The statement that writes outcomes is planned once for a while, and writes the rows whatever the session knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database import prepared_statement
from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import job_transitions
from celery_capacity.routing.store.job_transitions import Transition
from tests.fixtures.stores.transitions import Rows

NAME: Final = job_transitions._APPLY.name
#: `custom_plans` is there from Postgres 14 on.
KNOWN: Final = text(
    "SELECT prepare_time, cardinality(parameter_types) AS parameters,"
    " coalesce((to_jsonb(p) ->> 'custom_plans')::int, 0) AS custom FROM pg_prepared_statements p WHERE name = :name"
)


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


@pytest.fixture
def rows(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Rows:
    monkeypatch.setattr(prepared_statement, "KEPT_FOR", 3600.0)
    return Rows(connection)


def known(connection: Connection) -> Any:
    return connection.execute(KNOWN, {"name": NAME}).one_or_none()


def ends(rows: Rows, *jobs: str) -> None:
    """Admit each of these jobs, and end it."""
    rows.insert(*jobs)
    for state, step, outcome in (("admitted", Step.ADMITTED, ""), ("succeeded", Step.ENDED, "succeeded")):
        batch = [Transition(job, Token(1, 1), state, step, "a", "a-life", 10, 20, 30, 0, outcome) for job in jobs]
        assert [(transition.job, transition.state) for transition in rows.apply(batch)] == [
            (transition.job, state) for transition in rows.own(batch)
        ]
    for job in jobs:
        assert rows.row(job)["state"] == "succeeded"
        assert rows.attempts(job) == [(1, 1, "a", 10, 20, 30, "succeeded", None)]


def test_statement_is_planned_once_and_others_as_before(rows: Rows, connection: Connection) -> None:
    ends(rows, "j0")
    before, until = known(connection), connection.info[NAME]
    for number in range(1, 5):
        ends(rows, f"j{number}", f"k{number}")
    assert known(connection) == before
    assert connection.info[NAME] == until, "its use makes it no younger"
    assert before.custom == 0
    for setting in ("plan_cache_mode", "enable_seqscan", "enable_hashjoin", "enable_mergejoin", "enable_material"):
        assert connection.execute(text(f"SHOW {setting}")).scalar() in ("auto", "on")


def test_a_session_that_forgot_it_learns_it_again(rows: Rows, connection: Connection) -> None:
    ends(rows, "j0")
    connection.exec_driver_sql(f"DEALLOCATE {NAME}")
    ends(rows, "j1")
    assert known(connection) is not None
    # The statement is to be planned anew, and the session has none.
    connection.exec_driver_sql(f"DEALLOCATE {NAME}")
    connection.info[NAME] = 0.0
    ends(rows, "j2")
    assert known(connection) is not None


def test_a_session_that_knows_it_from_another_process_says_it_anew(rows: Rows, connection: Connection) -> None:
    ends(rows, "j0")
    before = known(connection)
    # A pooler gives sessions to others, with the statements that they have prepared_statement.
    del connection.info[NAME]
    ends(rows, "j1")
    assert known(connection).prepare_time > before.prepare_time


class _EachTimeAnother:
    """A pooler whose sessions never know a prepared statement, and never take a new one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def exec_driver_sql(self, message: str, values: Any = None) -> Any:
        self.asked += 1
        knows, should = known(self._connection) is not None, message.startswith("PREPARE")
        if knows != should:
            self._connection.exec_driver_sql(f"PREPARE {NAME} AS SELECT 1" if should else f"DEALLOCATE {NAME}")
        return self._connection.exec_driver_sql(message, values)


def test_a_pooler_that_gives_another_session_each_time_does_no_harm(rows: Rows, connection: Connection) -> None:
    pooled = _EachTimeAnother(connection)
    rows.connection = pooled  # type: ignore[assignment]
    ends(rows, "j0")
    assert pooled.asked == 6, "three times for each batch"


@pytest.mark.leaves("I4", because="rows of attempts are made for their number alone")
def test_a_plan_that_was_made_for_small_tables_is_not_kept_for_ever(
    rows: Rows, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_statement, "KEPT_FOR", 0.0)
    ends(rows, "j0", "j1")
    connection.exec_driver_sql("ANALYZE jobs, attempts")
    ends(rows, "j2")
    before = known(connection)
    connection.exec_driver_sql(
        "INSERT INTO jobs (id, name, state, shape, request, queue, message)"
        " SELECT 'old-' || n, 'task', 'accepted', 'cpus=1000', '{}', 'celery', 'message'"
        " FROM generate_series(1, 5000) n"
    )
    connection.exec_driver_sql(
        "INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation)"
        " SELECT id, 1, 1, 'a', 'a-life' FROM jobs WHERE id LIKE 'old-%%'"
    )
    ends(rows, "j3")
    after = known(connection)
    assert after.prepare_time > before.prepare_time
    assert not reads_whole(connection, after.parameters)


def reads_whole(connection: Connection, parameters: int) -> list[str]:
    """Return the lines where the plan that the session keeps reads a table from end to end, be it by an index."""
    explain = f"EXPLAIN EXECUTE {NAME} ({', '.join(['NULL'] * parameters)})"
    lines = connection.exec_driver_sql(f"SET LOCAL plan_cache_mode = force_generic_plan; {explain}").scalars().all()
    scan = re.compile("Seq Scan on|Index (Only )?Scan (using|on)")
    scans = [number for number, line in enumerate(lines) if scan.search(line)]
    assert len(scans) >= 4
    return [lines[number] for number in scans if "Index Cond" not in "".join(lines[number + 1 : number + 2])]


def test_in_a_transaction_it_is_not_prepared(rows: Rows, engine: Engine, connection: Connection) -> None:
    rows.insert("j0")
    with engine.connect() as session, session.begin():
        transition = Transition("j0", Token(1, 1), "running", Step.RUNNING, "a", "a-life", 10, 20, 20, 0)
        assert [applied.state for applied in job_transitions.apply(session, rows.own([transition]))] == ["running"]
        assert known(session) is None
        assert session.execute(text("SHOW plan_cache_mode")).scalar() == "auto"
        assert rows.row("j0")["state"] == "accepted", "it is not committed"
    assert rows.row("j0")["state"] == "running"
    # Nor in a transaction that was begun by a statement.
    connection.exec_driver_sql("BEGIN")
    rows.apply([Transition("j0", Token(1, 1), "succeeded", Step.ENDED, "a", "a-life", 10, 20, 30, 0, "succeeded")])
    connection.exec_driver_sql("ROLLBACK")
    assert known(connection) is None
    assert rows.row("j0")["state"] == "running"


def test_many_jobs_have_a_plan_of_their_own(rows: Rows, connection: Connection) -> None:
    ends(rows, *(f"j{number:03}" for number in range(job_transitions.FEW + 1)))
    assert known(connection) is None
    ends(rows, *(f"k{number:03}" for number in range(job_transitions.FEW)))
    assert known(connection) is not None


def test_an_execution_that_fails_leaves_all_as_it_was(rows: Rows, database_url: str) -> None:
    rows.insert("j0", "j1")
    batch = [
        Transition(job, Token(1, 1), "running", Step.RUNNING, "a", "a-life", 10, 20, 20, 0) for job in ("j0", "j1")
    ]
    bounded = create_engine(database_url, isolation_level="AUTOCOMMIT", connect_args={"options": "-c lock_timeout=50"})
    with bounded.connect() as session:
        for _ in range(2):
            with rows.connection.engine.connect() as other, other.begin():
                other.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": rows.prefix + "j1"})
                with pytest.raises(OperationalError) as caught:
                    job_transitions.apply(session, rows.own(batch))
                assert is_locked(caught.value)
            assert [rows.row(job)["state"] for job in ("j0", "j1")] == ["accepted", "accepted"]
        assert [applied.state for applied in job_transitions.apply(session, rows.own(batch))] == ["running", "running"]
    bounded.dispose()
