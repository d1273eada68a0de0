"""The archive has a partition for each month: made before or when it is needed, and dropped as a whole."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError

from celery_capacity import migrations
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.insert import retries
from celery_capacity.routing.inspect import job_lookup
from celery_capacity.routing.recovery import revocation
from celery_capacity.routing.store import archive, queries
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.retention import archive as duty
from tests.fixtures.processes.platforms import ROOT
from tests.fixtures.stores.staged import Stage

TABLES: Final = ("jobs_archive", "attempts_archive")
_MONTHS: Final = text("""
SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = CAST(:parent AS regclass) ORDER BY 1
""")
_JOB: Final = text("""
WITH job AS (
  INSERT INTO jobs_archive (seq, id, name, state, epoch, attempt, losses, priority, request, declared, queue, retries,
    nesting, submitted_at, finished_at, message_bytes, archived_at)
  VALUES (:seq, 'job-' || :seq, 'task', 'succeeded', 1, 1, 0, 0, '{"slots": 1}', true, 'celery', 0, 0, :at, :at, 1, :at)
)
INSERT INTO attempts_archive (job_seq, epoch, attempt, worker, incarnation, ended_at, archived_at)
VALUES (:seq, 1, 1, 'a', 'a-life', :at, :at)
""")


def months(connection: Connection, table: str = "jobs_archive") -> list[str]:
    """Return the months that have a partition, such as 2026_12, oldest first."""
    return [name.removeprefix(f"{table}_") for name in connection.execute(_MONTHS, {"parent": table}).scalars()]


def name_of(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y_%m")


def month_before(number: int) -> datetime:
    """Return a time in the middle of a month, so many months before this one."""
    now = datetime.now(UTC)
    months_so_far = now.year * 12 + now.month - 1 - number
    return datetime(months_so_far // 12, months_so_far % 12 + 1, 15, tzinfo=UTC)


def without_months(connection: Connection) -> None:
    for table in TABLES:
        for month in months(connection, table):
            connection.execute(text(f"DROP TABLE {table}_{month}"))


def make_month(connection: Connection, at: datetime) -> None:
    """Make the partitions of a month, and a job with its attempt in them."""
    start, end = at.replace(day=1), (at.replace(day=1) + timedelta(days=31)).replace(day=1)
    for table in TABLES:
        connection.execute(
            text(
                f"CREATE TABLE {table}_{name_of(at)} PARTITION OF {table}"
                f" FOR VALUES FROM ('{start.isoformat()}') TO ('{end.isoformat()}')"
            )
        )
    connection.execute(_JOB, {"seq": int(at.strftime("%Y%m")), "at": at})


def end_job(stage: Stage) -> str:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job)
    return job


@pytest.fixture
def connection(engine: Engine) -> Any:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


# -- made


def test_new_database_has_the_month_and_all_before_it(connection: Connection) -> None:
    assert months(connection) == months(connection, "attempts_archive") == [name_of(datetime.now(UTC))]
    connection.execute(_JOB, {"seq": 1, "at": datetime(2001, 1, 1, tzinfo=UTC)})


def test_missing_month_is_made_by_the_move_that_needs_it(stage: Stage) -> None:
    job = end_job(stage)
    with stage.engine.connect() as connection:
        without_months(connection)
        assert archive.archive_finished(connection, 0, 10) == 1
        assert months(connection) == months(connection, "attempts_archive") == [name_of(datetime.now(UTC))]
        record = queries.find(connection, job)
    assert record is not None
    assert len(record.attempts) == 1


def test_moves_at_once_make_a_missing_month_once(engine: Engine, connection: Connection) -> None:
    without_months(connection)

    def move() -> int:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as beside:
            return archive.archive_finished(beside, 0, 10)

    with ThreadPoolExecutor(6) as threads:
        assert [run.result() for run in [threads.submit(move) for _ in range(6)]] == [0] * 6
    assert months(connection) == [name_of(datetime.now(UTC))]


def test_next_month_is_made_a_week_before(connection: Connection) -> None:
    in_a_week = connection.execute(text("SELECT now() + interval '7 days'")).scalar_one()
    for _ in range(2):
        archive.open_next_month(connection)
        assert months(connection) == sorted({name_of(datetime.now(UTC)), name_of(in_a_week)})


def test_month_is_that_of_utc_whatever_the_session_has(connection: Connection) -> None:
    without_months(connection)
    connection.execute(text("SET timezone = 'Pacific/Kiritimati'"))
    connection.execute(text("SET datestyle = 'SQL, DMY'"))
    archive.archive_finished(connection, 0, 1)
    bounds = "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'jobs_archive_' || :month"
    connection.execute(text("SET timezone = 'UTC'"))
    connection.execute(text("SET datestyle = 'ISO'"))
    (month,) = months(connection)
    shown = connection.execute(text(bounds), {"month": month}).scalar_one()
    assert shown.startswith(f"FOR VALUES FROM ('{month.replace('_', '-')}-01 00:00:00+00')")
    connection.execute(text("RESET timezone"))
    connection.execute(text("RESET datestyle"))


def test_reader_of_the_archive_does_not_keep_a_month_from_being_made(engine: Engine, connection: Connection) -> None:
    without_months(connection)
    with engine.connect() as reader, reader.begin():
        reader.execute(text("SELECT count(*) FROM jobs_archive"))
        connection.execute(text("SET lock_timeout = '2s'"))
        assert archive.archive_finished(connection, 0, 1) == 0
    connection.execute(text("RESET lock_timeout"))


# -- dropped


def test_months_that_ended_long_ago_are_dropped_oldest_first(connection: Connection) -> None:
    without_months(connection)
    ages = [0, 1, 2, 3]
    for age in ages:
        make_month(connection, month_before(age))
    names = [name_of(month_before(age)) for age in ages]
    keep = (datetime.now(UTC) - month_before(1)).total_seconds()
    assert archive.drop_oldest_month(connection, keep) == names[3]
    assert connection.execute(text("SELECT count(*) FROM attempts_archive")).scalar_one() == 3
    assert archive.drop_oldest_month(connection, keep) == names[2]
    assert archive.drop_oldest_month(connection, keep) is None
    assert months(connection) == months(connection, "attempts_archive") == sorted(names[:2])
    rest = connection.execute(text("SELECT id FROM jobs_archive ORDER BY seq")).scalars().all()
    assert rest == [f"job-{month_before(age):%Y%m}" for age in (1, 0)]


def test_statement_of_the_page_drops_months_older_than_a_year(connection: Connection) -> None:
    page = (ROOT / "docs" / "how-to" / "sizing.md").read_text(encoding="utf-8")
    (statement,) = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    without_months(connection)
    for age in (11, 13, 14):
        make_month(connection, month_before(age))
    dropped = [connection.execute(text(statement)).scalar_one() for _ in range(3)]
    assert dropped == [name_of(month_before(14)), name_of(month_before(13)), None]
    assert months(connection) == [name_of(month_before(11))]


def test_present_month_is_never_dropped(connection: Connection) -> None:
    assert [archive.drop_oldest_month(connection, keep) for keep in (0.0, -1e9)] == [None, None]


def test_nobody_but_the_owner_drops_months_unless_it_is_allowed(connection: Connection) -> None:
    may = text("SELECT has_function_privilege('public', 'drop_archived(double precision)', 'EXECUTE')")
    assert not connection.execute(may).scalar_one()


def test_detached_month_and_other_tables_are_left_alone(connection: Connection) -> None:
    old = name_of(month_before(5))
    without_months(connection)
    make_month(connection, month_before(5))
    connection.execute(text(f"ALTER TABLE jobs_archive DETACH PARTITION jobs_archive_{old}"))
    assert archive.drop_oldest_month(connection, 0) == old
    assert connection.execute(text(f"SELECT count(*) FROM jobs_archive_{old}")).scalar_one() == 1
    connection.execute(text(f"DROP TABLE jobs_archive_{old}"))


def test_drop_waits_for_no_reader_for_long(engine: Engine, connection: Connection) -> None:
    without_months(connection)
    make_month(connection, month_before(3))
    with engine.connect() as reader, reader.begin():
        reader.execute(text("SELECT count(*) FROM jobs_archive"))
        with pytest.raises(DBAPIError, match="lock timeout"):
            archive.drop_oldest_month(connection, 0)
    assert archive.drop_oldest_month(connection, 0) == name_of(month_before(3))


@pytest.mark.parametrize(("keep", "dropped"), [("0", 0), ("3600", 1)])
def test_duty_drops_months_if_the_setting_says_so(
    connection: Connection, platform_environment: dict[str, str], keep: str, dropped: int
) -> None:
    without_months(connection)
    make_month(connection, month_before(3))
    settings = Settings.from_environ({**platform_environment, "PLATFORM_KEEP_ARCHIVED": keep})
    stores = Stores(lambda _: settings)
    app: Any = None  # the duty has no use for an app
    assert duty.run_once(app, stores)["months"] == dropped
    assert name_of(datetime.now(UTC) + timedelta(days=7)) in months(connection)
    stores.engine.dispose()


# -- found


def test_job_of_any_of_24_months_is_found_by_index(connection: Connection) -> None:
    without_months(connection)
    for age in range(24):
        make_month(connection, month_before(age))
    connection.execute(text("SET enable_seqscan = off"))
    statements = (
        "SELECT max(seq) FROM jobs_archive WHERE id = 'x'",
        "SELECT state FROM jobs_archive WHERE id = 'x' ORDER BY seq DESC LIMIT 1",
        "SELECT id, state, worker FROM jobs_archive WHERE id = ANY(CAST('{x,y}' AS text[])) ORDER BY id, seq DESC",
        "SELECT id FROM jobs_archive WHERE id >= 'x' ORDER BY id LIMIT 64",
        "SELECT * FROM attempts_archive WHERE job_seq = 1 ORDER BY epoch, attempt",
    )
    for statement in statements:
        plan = "\n".join(connection.execute(text(f"EXPLAIN {statement}")).scalars())
        assert "Seq Scan" not in plan, plan
    connection.execute(text("RESET enable_seqscan"))
    job = f"job-{month_before(17):%Y%m}"
    record = queries.find(connection, job)
    assert record is not None
    assert len(record.attempts) == 1
    assert retries.is_archived(connection, job)
    assert job_lookup.with_prefix(connection, job[:-1])
    assert set(revocation.standing(connection, [job, "unknown"])) == {job}


# -- upgraded


def test_upgrade_and_downgrade_keep_all_rows_and_grants(database_url: str) -> None:
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")

    def content() -> str:
        with engine.connect() as connection:
            query = "SELECT to_jsonb(t) - ARRAY['archived_at', 'shape', 'expected_ms'] FROM {} t ORDER BY 1"
            rows = [connection.execute(text(query.format(table))).all() for table in TABLES]
            grants = connection.execute(
                text("SELECT relname, relacl::text FROM pg_class WHERE relname = ANY(:tables) ORDER BY 1"),
                {"tables": list(TABLES)},
            ).all()
        return json.dumps([[list(row) for row in table] for table in (*rows, grants)])

    with engine.connect() as connection:
        for age in (30, 2, 0):
            connection.execute(_JOB, {"seq": age, "at": month_before(age)})
        connection.execute(text("GRANT SELECT ON jobs_archive, attempts_archive TO PUBLIC"))
    before = content()
    migrations.downgrade(database_url, "0013")
    assert content() == before
    migrations.upgrade(database_url)
    assert content() == before
    with engine.connect() as connection:
        assert months(connection) == [name_of(datetime.now(UTC))]
    engine.dispose()


def test_archive_works_on_through_upgrade_and_downgrade_of_shapes(stage: Stage, database_url: str) -> None:
    kept = "SELECT shape, expected_ms FROM jobs_archive ORDER BY seq"

    def move() -> None:
        end_job(stage)
        with stage.engine.connect() as connection:
            assert archive.archive_finished(connection, 0, 10) == 1

    move()
    migrations.downgrade(database_url, "0027")
    move()
    migrations.upgrade(database_url)
    move()
    with stage.engine.connect() as connection:
        rows = [tuple(row) for row in connection.execute(text(kept))]
        assert rows == [(None, None), (None, None), ("cpus=1000,slots=1", 0)]
        # A month that is made later has the columns too.
        without_months(connection)
    move()
    with stage.engine.connect() as connection:
        assert [tuple(row) for row in connection.execute(text(kept))] == [("cpus=1000,slots=1", 0)]
