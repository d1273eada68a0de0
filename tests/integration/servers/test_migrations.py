"""The tables: the revisions create and remove them, one upgrade at a time."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, TableClause, create_engine, inspect, text

from celery_capacity import migrations
from celery_capacity.routing.database import schema
from celery_capacity.routing.errors import InvalidRequest, NotMigrated, StoreUnavailable
from celery_capacity.routing.insert.columns import COLUMNS
from celery_capacity.routing.model.states import FINAL, State

TABLES = {
    "jobs",
    "attempts",
    "jobs_archive",
    "attempts_archive",
    "workers",
    "audit",
    "job_lines",
    "authority",
    "cordons",
    "declarations",
    "operator_actions",
    "pauses",
    "tenants",
    "estimates",
    "reservations",
    "run_times",
    "run_times_read",
    "quarantine",
    "runner",
    "chords",
    "chord_parts",
    "infeasible",
    "ageing",
    "ageing_marks",
    "job_keys",
    "key_notes",
    "key_rates",
    "unique_keys",
    "dependencies",
    "rates",
    "retries",
}


@pytest.fixture
def unmigrated(database_url: str) -> str:
    """Return the URL of a database without any of the platform's tables."""
    migrations.downgrade(database_url, "base")
    return database_url


def _tables(url: str) -> set[str]:
    engine = create_engine(url)
    try:
        names = set(inspect(engine).get_table_names()) - {migrations.VERSION_TABLE}
        return {name for name in names if not re.search(r"_archive_\d{4}_\d{2}$", name)}
    finally:
        engine.dispose()


def test_the_revisions_go_up_and_down_and_up_again(unmigrated: str) -> None:
    assert _tables(unmigrated) == set()
    assert migrations.current(unmigrated) is None
    migrations.upgrade(unmigrated)
    assert _tables(unmigrated) == TABLES
    assert migrations.current(unmigrated) == migrations.HEAD
    migrations.downgrade(unmigrated, "base")
    assert _tables(unmigrated) == set()
    migrations.upgrade(unmigrated)
    migrations.check(unmigrated)


def test_the_constant_head_is_the_newest_revision() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_heads() == [migrations.HEAD]


def test_tables_of_queries_have_columns_that_the_revisions_make(engine: Engine) -> None:
    made = {name: {column["name"] for column in inspect(engine).get_columns(name)} for name in TABLES}
    named = {table.name: set(table.c.keys()) for table in vars(schema).values() if isinstance(table, TableClause)}
    assert len(named) == 9
    assert [(name, columns - made[name]) for name, columns in named.items() if columns - made[name]] == []
    assert {column.name for column in COLUMNS} <= made["jobs"]


@pytest.mark.parametrize(
    ("constraint", "states"), [("jobs_state_known", set(State)), ("jobs_finished_when_final", FINAL)]
)
def test_constraint_names_the_states_of_the_code(engine: Engine, constraint: str, states: set[State]) -> None:
    definition = text("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = :name")
    with engine.connect() as connection:
        words = re.findall(r"'(\w+)'", str(connection.execute(definition, {"name": constraint}).scalar_one()))
    assert sorted(words) == sorted(state.value for state in states)


def test_functions_with_their_owners_rights_mean_the_platforms_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        functions = connection.execute(
            text(
                "SELECT proname, proconfig FROM pg_proc"
                " WHERE prosecdef AND pronamespace = CAST('public' AS regnamespace)"
            )
        ).all()
    assert {name for name, _ in functions} >= {"archive_finished", "claim_key", "note_chord"}
    # Functions of limits by key also tell the planner not to read whole tables.
    assert {next(iter(config or ()), None) for _, config in functions} == {"search_path=public, pg_temp"}


def test_the_authority_is_one_row_and_stays_one(engine: Engine) -> None:
    with engine.connect() as connection:
        row = connection.execute(text("SELECT epoch, authority FROM authority")).one()
        assert tuple(row) == (1, "ledger")
        with pytest.raises(Exception, match="authority_"):
            connection.execute(text("INSERT INTO authority (\"only\", epoch, authority) VALUES (false, 2, 'ledger')"))


def test_upgrades_at_once_do_the_work_once(unmigrated: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(migrations.upgrade, unmigrated) for _ in range(4)]:
            done.result()
    assert _tables(unmigrated) == TABLES
    assert migrations.current(unmigrated) == migrations.HEAD


def test_an_upgrade_waits_for_one_in_another_process(unmigrated: str) -> None:
    engine = create_engine(unmigrated)
    waiting = text(
        "SELECT count(*) FROM pg_locks WHERE NOT granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with engine.connect() as other, ThreadPoolExecutor(1) as threads:
        with other.begin():
            other.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": migrations._LOCK})
            upgrading = threads.submit(migrations.upgrade, unmigrated)
            # The upgrade has reached the lock as soon as Postgres reports a waiting session.
            while not other.execute(waiting).scalar_one():
                assert not upgrading.done()
        upgrading.result()
    engine.dispose()
    assert migrations.current(unmigrated) == migrations.HEAD


def test_a_broken_upgrade_leaves_nothing(unmigrated: str) -> None:
    engine = create_engine(unmigrated)
    with engine.begin() as connection:
        # The last table of the first revision exists already.
        connection.execute(text("CREATE TABLE declarations (name text)"))
    engine.dispose()
    with pytest.raises(Exception, match="declarations"):
        migrations.upgrade(unmigrated)
    assert _tables(unmigrated) == {"declarations"}
    assert migrations.current(unmigrated) is None


def test_the_revisions_are_found_from_any_folder(
    unmigrated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    migrations.upgrade(unmigrated)
    assert os.listdir(tmp_path) == []


def test_a_database_without_tables_says_what_to_run(unmigrated: str) -> None:
    with pytest.raises(NotMigrated, match=r"revision none.*`celery -A platform db upgrade`"):
        migrations.check(unmigrated)


def test_a_database_of_a_newer_version_is_not_to_be_upgraded(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(NotMigrated, match=r"9999.*Install the version"):
        migrations.check(engine)


def test_a_database_of_before_the_first_revision_says_who_upgrades_it(engine: Engine, database_url: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {migrations.VERSION_TABLE} SET version_num = '0009'"))
    for action in (migrations.check, migrations.upgrade):
        with pytest.raises(NotMigrated, match=r"0009.*begins with 0011.*with the version of the platform that made it"):
            action(database_url)


def test_an_unknown_revision_is_refused(database_url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"'nope'.*\"head\""):
        migrations.upgrade(database_url, "nope")


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(StoreUnavailable) as raised:
        migrations.check("postgresql+psycopg2://me:secret@127.0.0.1:1/platform")
    assert "127.0.0.1:1" in str(raised.value)
    assert "secret" not in str(raised.value)
