"""Jobs in Postgres, and the free CPUs as a sum over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg2
from sqlalchemy import make_url

from benchmarks.proposals.way import ASKED, CPUS, Cluster, Held

#: Key of the advisory lock under which a job is admitted: two sums at once would both see the same room.
LOCK = 4242

_TABLES = """
DROP SCHEMA IF EXISTS {0} CASCADE;
CREATE SCHEMA {0};
CREATE TABLE {0}.workers (name text PRIMARY KEY, cpus int NOT NULL);
CREATE TABLE {0}.jobs (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, state text NOT NULL, worker text,
  cpus int NOT NULL, submitted_at timestamptz NOT NULL DEFAULT now(), finished_at timestamptz, args text NOT NULL
);
"""
_INDEX = "CREATE INDEX ON {0}.jobs (worker) INCLUDE (cpus) WHERE state = 'running'"
#: Inserts rows of some 200 bytes, the size of a job's row without its message.
_ENDED = """
INSERT INTO {0}.jobs (name, state, worker, cpus, finished_at, args)
SELECT 'tasks.render', 'succeeded', 'w0000', %s, now(), repeat('x', 100) FROM generate_series(1, %s)
"""
_RUNNING = """
INSERT INTO {0}.jobs (name, state, worker, cpus, args)
SELECT 'tasks.render', 'running', %s, %s, repeat('x', 100) FROM generate_series(1, %s)
"""
_TAKEN = "SELECT coalesce(sum(cpus), 0) FROM {0}.jobs WHERE state = 'running'"
_FREE = """
SELECT w.name, w.cpus - coalesce(t.cpus, 0) FROM {0}.workers w LEFT JOIN
  (SELECT worker, sum(cpus) AS cpus FROM {0}.jobs WHERE state = 'running' GROUP BY worker) t ON t.worker = w.name
"""
_ADMIT = f"""
INSERT INTO {{0}}.jobs (name, state, worker, cpus, args)
SELECT 'tasks.render', 'running', f.name, %(asked)s, repeat('x', 100)
FROM ({_FREE}) AS f (name, free) WHERE f.free >= %(asked)s ORDER BY f.free, f.name LIMIT 1
RETURNING worker, id
"""
_RELEASE = "UPDATE {0}.jobs SET state = 'succeeded', finished_at = now() WHERE id = %s AND state = 'running'"


class Sums:
    """A table of workers, filled by hand, and a table of jobs. `indexed`: with the index that fits the sum.

    An admission is one transaction under a lock; otherwise two admissions would overcommit.
    """

    def __init__(self, database_url: str, *, indexed: bool) -> None:
        self._url = database_url
        self._indexed = indexed
        self._schema = "sums_indexed" if indexed else "sums"
        self._connection = connect(database_url)

    def load(self, cluster: Cluster) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(self._on(_TABLES))
            rows = [(name, CPUS) for name in cluster.names]
            cursor.executemany(self._on("INSERT INTO {0}.workers VALUES (%s, %s)"), rows)
            cursor.execute(self._on(_ENDED), (ASKED, max(0, cluster.rows - cluster.running)))
            for number, name in enumerate(cluster.names):
                if jobs := cluster.jobs_on(number):
                    cursor.execute(self._on(_RUNNING), (name, ASKED, jobs))
            if self._indexed:
                cursor.execute(self._on(_INDEX))
            cursor.execute(self._on("VACUUM ANALYZE {0}.jobs"))
            cursor.execute(self._on("ANALYZE {0}.workers"))

    def apart(self) -> Sums:
        return Sums(self._url, indexed=self._indexed)

    def taken(self) -> int:
        return int(self._ask(_TAKEN)[0][0])

    def free(self) -> Mapping[str, int]:
        return {name: int(free) for name, free in self._ask(_FREE)}

    def admit(self) -> Held | None:
        with self._connection.cursor() as cursor:
            cursor.execute("BEGIN; SELECT pg_advisory_xact_lock(%s)", (LOCK + self._indexed,))
            cursor.execute(self._on(_ADMIT), {"asked": ASKED})
            row = cursor.fetchone()
            cursor.execute("COMMIT")
        return None if row is None else Held(row[0], str(row[1]))

    def release(self, held: Held) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(self._on(_RELEASE), (held.token,))

    def beat(self, worker: str) -> None:
        """Do nothing: a row of the table of workers stays until somebody deletes it."""

    def watch(self) -> None:
        """Do nothing: nobody looks."""

    def empty(self) -> None:
        """Do nothing: there is no quick store."""

    def recover(self) -> int:
        """Do nothing, because nothing was lost. Return 0."""
        return 0

    def close(self) -> None:
        self._connection.close()

    def _ask(self, question: str) -> list[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(self._on(question))
            return list(cursor.fetchall())

    def _on(self, statement: str) -> str:
        """Return the statement on this way's own tables."""
        return statement.format(self._schema)


def connect(database_url: str) -> Any:
    """Return a connection whose statements are committed one by one, unless they say BEGIN."""
    plain = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg2.connect(plain)
    connection.autocommit = True
    return connection
