"""Errors of Postgres as people read them."""

from __future__ import annotations

import psycopg2
import pytest
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database.postgres_errors import one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("server closed the connection\n", "server closed the connection"),
        (
            'connection to "db", port 5432 failed: Connection refused\n\tIs the server running on that host?\n',
            'connection to "db", port 5432 failed: Connection refused. Is the server running on that host?',
        ),
        ("it failed:\n  no room\n\n", "it failed: no room"),
        ("", ""),
    ],
)
def test_lines_of_the_driver_become_sentences(text: str, line: str) -> None:
    assert one_line(OperationalError(None, None, psycopg2.OperationalError(text))) == line
