"""A statement that costs Postgres more to plan than to run: prepared and planned once for each connection, for a while.

The driver sends text, so a statement that comes 50 times a second is parsed and planned as often. Prepared it is parsed
once, but Postgres goes on planning it for the values of each execution, since it guesses better from those; here the
values are few and say nothing new. So one plan for all is asked for by `plan_cache_mode`, and for this statement alone:
in the message that executes it, which is a transaction of its own.

Such a plan is as good as the tables were when it was made: one that was made for empty tables reads them from end to
end. So it is planned by index where that can be asked for, and it is used for `KEPT_FOR` seconds, in which no table
grows too large for it, and then made anew.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

#: Seconds for which a plan is used.
KEPT_FOR: Final = 2.0
#: SQLSTATEs: this session does not know the prepared statement; it has one of that name. (A pooler gave us another one,
#: or the message that prepared it failed.)
_UNKNOWN: Final = "26000"
_KNOWN: Final = "42P05"
#: All that would read a table from end to end while it is small. (What is left of that, in a table of ten rows say, is
#: over with the plan.)
_READING_ALL: Final = ("seqscan", "hashjoin", "mergejoin", "material")
_BY_INDEX: Final = "".join(f"SET LOCAL enable_{way} = off; " for way in _READING_ALL)


@dataclass(frozen=True, slots=True)
class Prepared:
    """`plain`: the same statement, not prepared."""

    name: str
    plain: TextClause
    _execute: str
    _prepare: str
    _again: str

    @classmethod
    def of(cls, name: str, statement: str) -> Prepared:
        """Of a statement with parameters (:one) that says the type of each at least once: CAST(:one AS json)."""
        types = dict(re.findall(r"CAST\(:(\w+) AS ([\w\[\]]+)\)", statement))
        number = {parameter: str(place) for place, parameter in enumerate(types, 1)}
        body = re.sub(r"(?<!:):([a-z]\w*)", lambda found: f"${number[found[1]]}", statement).replace("%", "%%")
        # (Behind a pooler a session may know the statement of another version.)
        name = f"{name}_{hashlib.sha256(body.encode()).hexdigest()[:8]}"
        execute = (
            "SET LOCAL plan_cache_mode = force_generic_plan; "
            f"EXECUTE {name} ({', '.join(f'%({parameter})s' for parameter in types)})"
        )
        prepare = f"PREPARE {name} ({', '.join(types.values())}) AS {body}; {_BY_INDEX}{execute}"
        return cls(name, text(statement), execute, prepare, f"DEALLOCATE {name}; {prepare}")

    def rows(self, connection: Connection, values: Mapping[str, str | int], *, few: bool) -> Sequence[Any]:
        """What it returns. `few`: the plan for a few values does; a statement about many is worth one of its own.

        In a transaction the statement is not prepared: one that is not known there would end it, and its plan, once
        asked for, would be that of all that follows."""
        driver: Any = connection.connection.driver_connection
        idle = driver.autocommit and driver.get_transaction_status() == TRANSACTION_STATUS_IDLE
        if not (few and idle):
            return connection.execute(self.plain, values).all()
        # SQLAlchemy keeps `info` with the connection to the server, for as long as that lives.
        until, now = connection.info.get(self.name), time.monotonic()
        message = self._prepare if until is None else self._execute if now < until else self._again
        for _ in range(3):
            try:
                rows = connection.exec_driver_sql(message, dict(values)).all()
            except DBAPIError as error:
                code = getattr(error.orig, "pgcode", None)
                if code not in (_UNKNOWN, _KNOWN):
                    raise
                message = self._prepare if code == _UNKNOWN else self._again
            else:
                if message is not self._execute:
                    connection.info[self.name] = now + KEPT_FOR
                return rows
        # (Each time another session.)
        return connection.execute(self.plain, values).all()
