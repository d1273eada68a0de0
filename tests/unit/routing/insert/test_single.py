"""Insert of one row by a prepared statement, behind a pooler: `routing.insert.single`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.insert import single


class Unknown(psycopg2.Error):
    pgcode = "26000"


class Known(psycopg2.Error):
    pgcode = "42P05"


class Pooler:
    """Connection through a pooler that gives each message the session that `sessions` names next."""

    driver_connection = None

    def __init__(self, sessions: str, *, prepared: str = "") -> None:
        self.info: dict[str, Any] = {}
        self._sessions: Iterator[str] = iter(sessions)
        self._prepared = set(prepared)
        self.inserted = 0

    def cursor(self) -> Pooler:
        return self

    def execute(self, message: str, values: Any = None) -> None:
        session = next(self._sessions)
        if message.startswith("PREPARE"):
            if session in self._prepared:
                raise Known
            self._prepared.add(session)
        elif session not in self._prepared:
            raise Unknown
        else:
            self.inserted += 1

    def fetchone(self) -> Any:
        return ("row",)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("sessions", "prepared"),
    [("aa", ""), ("ab" + "bb", ""), ("ab" + "ab" + "ab" + "bb", "a"), ("ab" + "aa", "a")],
)
def test_insert_finds_a_session_that_knows_its_statement(sessions: str, prepared: str) -> None:
    pooler: Any = Pooler(sessions, prepared=prepared)
    assert single.execute_insert(pooler, lambda error: None, single.BY_ANYBODY, ()) == ("row",)
    assert pooler.inserted == 1


def test_insert_gives_up_where_no_session_ever_knows_it() -> None:
    pooler: Any = Pooler("ab" * 20, prepared="a")
    with pytest.raises(DBAPIError):
        single.execute_insert(pooler, lambda error: None, single.BY_ANYBODY, ())
    assert pooler.inserted == 0
