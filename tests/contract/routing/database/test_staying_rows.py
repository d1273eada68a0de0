"""Waiting jobs that stay in Postgres: their numbers before each of many places are those before each single place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from sqlalchemy import Connection, Engine, text

from celery_capacity.routing.database import staying_rows
from celery_capacity.routing.policy.placement import order

#: Rows in turn: their shape, number and priority. Shapes a and b have jobs on both sides of others.
ROWS: Final = [("a", 3, 0), ("b", 2, 5), ("c", 4, 0), ("a", 2, 5), ("b", 3, 0), ("d", 1, 9)]
_INSERT: Final = text("""
INSERT INTO jobs (id, name, state, shape, request, queue, message, behind, priority)
SELECT gen_random_uuid()::text, 'task', 'waiting', :shape, '{}', 'celery', '{}', :shape, :priority
FROM generate_series(1, :number)
""")


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for shape, number, priority in ROWS:
            connection.execute(_INSERT, {"shape": shape, "number": number, "priority": priority})
        yield connection
        connection.exec_driver_sql("DELETE FROM jobs")


def test_numbers_before_many_places_are_those_before_each(connection: Connection) -> None:
    staying = staying_rows.ends(connection, staying_rows.numbers(connection))
    assert {shape: jobs.number for shape, jobs in staying.items()} == {"a": 5, "b": 5, "c": 4, "d": 1}
    places = connection.exec_driver_sql("SELECT priority, seq FROM jobs").all()
    before = staying_rows.before_each(connection, [order(*place) for place in places], staying)
    assert len(before) == sum(number for _, number, _ in ROWS)
    for place in places:
        assert before[order(*place)] == staying_rows.before(connection, *place)


def test_levels_have_number_and_first_job_of_each_priority(connection: Connection) -> None:
    numbers = staying_rows.levels(connection, ["a", "b"])
    assert numbers == {("a", 0): 3, ("a", 5): 2, ("b", 0): 3, ("b", 5): 2}
    levels = staying_rows.firsts(connection, {**numbers, ("c", 7): 1})
    firsts = {shape: staying_rows.ends(connection, {shape: 5})[shape].job for shape in ("a", "b")}
    assert sorted((shape, jobs.number, jobs.job == firsts[shape]) for shape, jobs in levels) == [
        *(("a", 2, True), ("a", 3, False), ("b", 2, True), ("b", 3, False)),
    ]


def test_revoked_job_is_not_counted(connection: Connection) -> None:
    connection.exec_driver_sql("UPDATE jobs SET revoked_at = now() WHERE shape IN ('c', 'd') AND mod(seq, 2) = 0")
    assert staying_rows.numbers(connection) == staying_rows.before(connection, -1, 0)
