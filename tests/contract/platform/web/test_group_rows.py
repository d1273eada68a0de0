"""Rows of the groups of a large backlog: the numbers of Postgres at the cost of the shapes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final
from weakref import WeakKeyDictionary

import pytest
from sqlalchemy import Engine, text

from celery_capacity.platform.web import group_rows
from celery_capacity.platform.web.group_rows import GroupFilter, GroupRow
from celery_capacity.platform.web.waiting_groups import WaitingGroups
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import staying_rows
from celery_capacity.routing.inspect import waiting
from celery_capacity.routing.inspect.waiting import LedgerReading
from celery_capacity.routing.model.request import Request, filed_shape
from celery_capacity.routing.recovery import refill
from tests.fixtures.stores.headed import Head

SHAPES: Final = [Request.of({"cpus": cpus}).shape for cpus in range(2000, 6000, 1000)]
_INSERT: Final = text("""
INSERT INTO jobs (id, name, state, epoch, step, shape, request, queue, message, behind)
SELECT gen_random_uuid()::text, 'task', 'waiting', 1, 11, :shape, '{}', 'celery', '{}', :behind
FROM generate_series(1, :number)
""")
CANCEL: Final = "UPDATE jobs SET state = 'cancelled', finished_at = now(), step = 9 WHERE "
_ROWS_READ: Final = text("""
SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0) FROM pg_stat_xact_user_tables WHERE relname = 'jobs'
""")


@pytest.fixture
def stage(short_head: None, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setattr(group_rows, "MANY", 1)
    monkeypatch.setattr(group_rows, "_counted", WeakKeyDictionary())
    stage = Head(engine, replace(settings, max_ledger_backlog=1))
    yield stage
    stage.sql("DELETE FROM jobs")
    stage.redis.flushdb()
    stage.close()


def keep_in_postgres(stage: Head, number: int) -> None:
    """Insert so many waiting jobs of each shape that stay in Postgres."""
    for shape in SHAPES:
        with stage.engine.connect() as connection:
            connection.execute(_INSERT, {"shape": shape, "behind": filed_shape(shape, "task"), "number": number})
    stage.sql("ANALYZE jobs")
    refill.restore_borders(stage.engine, stage.ledger)


def rows(stage: Head, monkeypatch: pytest.MonkeyPatch, many: int) -> list[GroupRow]:
    monkeypatch.setattr(group_rows, "MANY", many)
    with stage.engine.connect() as connection:
        return [
            replace(row, oldest=0.0) for row in group_rows.read(connection, LedgerReading(stage.redis), GroupFilter())
        ]


def rows_read(stage: Head, reader: WaitingGroups) -> int:
    """Return the rows of jobs that a reading of the groups fetches from Postgres."""
    with stage.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        before = connection.execute(_ROWS_READ).scalar_one()
        groups = reader.read(connection, stage.redis, stage.settings)
        read = connection.execute(_ROWS_READ).scalar_one() - before
        connection.exec_driver_sql("ROLLBACK")
    assert len(groups) == len(SHAPES)
    return int(read)


def test_reading_fetches_no_more_rows_of_a_longer_backlog(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "COUNTED_SHARE", 1e-9)
    reader, fetched = WaitingGroups(), []
    for number in (50, 1000):
        keep_in_postgres(stage, number)
        # The first reading counts all rows, which the next ones do not repeat.
        rows_read(stage, reader)
        fetched.append(rows_read(stage, reader))
    assert fetched[1] <= fetched[0]


def test_priorities_of_a_shape_are_counted_once_in_a_while(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_rows, "COUNTED_SHARE", 1e-9)
    keep_in_postgres(stage, 6)
    stage.sql("UPDATE jobs SET priority = 5 WHERE mod(seq, 2) = 0")
    counted: list[Any] = []
    count = staying_rows.levels

    def levels(connection: Any, shapes: Any) -> Any:
        counted.append(shapes)
        return count(connection, shapes)

    monkeypatch.setattr(staying_rows, "levels", levels)
    before = rows(stage, monkeypatch, 1)
    assert {(row.priority, row.waiting) for row in before} == {(0, 3), (5, 3)}
    assert len(before) == 2 * len(SHAPES)
    stage.sql(f"{CANCEL} id = :id", id=before[0].first)
    after = rows(stage, monkeypatch, 1)
    assert len(counted) == 1
    # The first job is that of the moment.
    assert {row.key for row in after} == {row.key for row in before}
    assert before[0].first not in {row.first for row in after}


def test_new_priority_is_counted_within_half_a_minute(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of seconds, on a slow Postgres, was used again for minutes."""
    monkeypatch.setattr(group_rows, "COUNTED_SHARE", 1e-9)
    keep_in_postgres(stage, 6)
    stage.sql("UPDATE jobs SET priority = 5 WHERE mod(seq, 2) = 0")
    assert {row.priority for row in rows(stage, monkeypatch, 1)} == {0, 5}
    stage.sql("UPDATE jobs SET priority = 7 WHERE priority = 5")
    monkeypatch.setattr(group_rows, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 31))
    assert {row.priority for row in rows(stage, monkeypatch, 1)} == {0, 7}


def test_ledger_gives_the_groups_that_postgres_counts(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for priority in (0, 5, 0, 0, 9, 0, 5, 0):
        stage.add(priority)
        stage.add(priority, cpus=2000)
    for _ in range(4):
        stage.add(cpus=3000)
    stage.refill()
    # Jobs that run alone next wait under another shape than others of their group.
    lost = [stage.insert({"cpus": 3000}) for _ in range(4)]
    stage.sql("UPDATE jobs SET losses = :losses WHERE id = ANY(:ids)", losses=stage.settings.most_losses - 1, ids=lost)
    for job in lost:
        stage.bring(job)
    stage.apply()
    stage.refill()
    on_its_way, alone = stage.insert({"cpus": 1000}), stage.insert({"cpus": 7000}, priority=3)
    assert {stage.row(job).state for job in (on_its_way, alone)} == {"accepted"}
    revoked = stage.insert({"cpus": 8000})
    stage.sql("UPDATE jobs SET revoked_at = now() WHERE id = :id", id=revoked)
    by_ledger, by_postgres = (rows(stage, monkeypatch, many) for many in (1, 10**9))
    assert by_ledger == by_postgres
    assert sum(row.waiting for row in by_ledger) == 26
    assert [row.priority for row in by_ledger][:3] == [9, 9, 5]


def test_cancelled_job_in_postgres_is_not_counted(stage: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_in_postgres(stage, 5)
    numbers: list[Any] = []
    for _ in range(2):
        waiting._marked.clear()
        numbers.append([row.waiting for row in rows(stage, monkeypatch, 1)])
        stage.sql(
            "UPDATE jobs SET state = 'cancelled', finished_at = now(), step = 9 WHERE seq = (SELECT min(seq) FROM jobs)"
        )
    assert numbers == [[5, 5, 5, 5], [4, 5, 5, 5]]


@pytest.mark.parametrize("authority", ["ledger", "postgres"])
def test_postgres_counts_while_it_decides(stage: Head, authority: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_in_postgres(stage, 3)
    stage.sql(
        "UPDATE jobs SET state = 'cancelled', finished_at = now(), step = 9 WHERE shape = :shape", shape=SHAPES[0]
    )
    stage.sql("UPDATE authority SET authority = :authority", authority=authority)
    assert [row.shape for row in rows(stage, monkeypatch, 1)] == SHAPES[1:]
