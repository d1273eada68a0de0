"""An error of Postgres says what is wrong, and names no arguments or results: it may stand in a log."""

from __future__ import annotations

import traceback

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from celery_capacity.workers.process.stores import make_engine

SECRET = "s3cret-argument"


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        # A parameter in the statement that failed.
        ("SELECT 1 / (length(:value) - length(:value))", "division by zero"),
        # Postgres's DETAIL names the whole row.
        (
            "INSERT INTO jobs (id, name, state, request, shape, queue, message, error)"
            " VALUES ('a', 'task', 'nonsense', '{}', '', 'celery', '', :value)",
            "jobs_state_known",
        ),
        ("INSERT INTO unique_keys (key, job) VALUES (:value, 'a'), (:value, 'b')", "unique_keys_pkey"),
        # The value itself is wrong.
        ("SELECT CAST(length(:value) AS integer) WHERE jsonb '1' = CAST(:value AS jsonb)", "invalid input syntax"),
    ],
)
def test_error_of_postgres_names_no_value(database_url: str, statement: str, says: str) -> None:
    engine = make_engine(database_url)
    with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text(statement), {"value": SECRET})
    engine.dispose()
    shown = "".join(traceback.format_exception(caught.value))
    assert says in shown
    # The lines of the traceback are those of this file and of libraries: none of them names the value.
    assert SECRET not in shown
    assert SECRET not in repr(caught.value.orig)
