"""Prepare a statement that costs Postgres more to plan than to run, and keep its plan on each connection for a while.

The driver sends text, so a statement that runs 50 times a second is parsed and planned as often. A prepared statement
is parsed once, but Postgres still plans it for the values of each execution, since values improve estimates. Here they
do not. So `plan_cache_mode` asks for one plan for all values. It is set in the message that executes the statement, a
transaction of its own, and holds for this statement alone.

Such a plan fits the tables of the moment at which it was made: a plan made for empty tables reads them from end to end.
So the statement is planned by index where that can be asked for. The plan is used for `KEPT_FOR` seconds, in which no
table grows too large for it, and then made anew.
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
#: SQLSTATEs: the session does not know the prepared statement; the session has one of that name already. A pooler gave
#: us another session, or the message that prepared the statement failed.
_UNKNOWN: Final = "26000"
_KNOWN: Final = "42P05"
#: Kinds of plans that would read a table from end to end while it is small. A remaining full read, of a table of ten
#: rows for example, ends with the plan.
_READING_ALL: Final = ("seqscan", "hashjoin", "mergejoin", "material")
_BY_INDEX: Final = "".join(f"SET LOCAL enable_{way} = off; " for way in _READING_ALL)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A statement to prepare. `plain`: its text without PREPARE."""

    name: str
    plain: TextClause
    _execute: str
    _prepare: str
    _again: str

    @classmethod
    def of(cls, name: str, statement: str) -> Prepared:
        """Make one from a statement with parameters (:value).

        The statement gives the type of each parameter at least once: CAST(:value AS json).
        """
        types = dict(re.findall(r"CAST\(:(\w+) AS ([\w\[\]]+)\)", statement))
        number = {parameter: str(index) for index, parameter in enumerate(types, 1)}
        body = re.sub(r"(?<!:):([a-z]\w*)", lambda match: f"${number[match[1]]}", statement).replace("%", "%%")
        # The digest: behind a pooler a session may know the statement of another version.
        name = f"{name}_{hashlib.sha256(body.encode()).hexdigest()[:8]}"
        execute = (
            "SET LOCAL plan_cache_mode = force_generic_plan; "
            f"EXECUTE {name} ({', '.join(f'%({parameter})s' for parameter in types)})"
        )
        prepare = f"PREPARE {name} ({', '.join(types.values())}) AS {body}; {_BY_INDEX}{execute}"
        return cls(name, text(statement), execute, prepare, f"DEALLOCATE {name}; {prepare}")

    def rows(self, connection: Connection, values: Mapping[str, str | int], *, few: bool) -> Sequence[Any]:
        """Execute the statement and return its rows. `few`: the kept plan will do; many values are worth a new one.

        In a transaction the statement is not prepared. An unknown statement would end the transaction, and the plan
        mode, once set, would hold for all statements that follow.
        """
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
        # Each try met another session.
        return connection.execute(self.plain, values).all()
