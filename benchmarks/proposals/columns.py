"""Taken CPUs as a column in Postgres that each admission and each end changes: no sum is computed."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.proposals.sums import connect
from benchmarks.proposals.way import ASKED, CPUS, Cluster, Held

_TABLES = """
DROP SCHEMA IF EXISTS columns CASCADE;
CREATE SCHEMA columns;
CREATE TABLE columns.workers (name text PRIMARY KEY, cpus int NOT NULL, taken int NOT NULL CHECK (taken <= cpus));
CREATE INDEX ON columns.workers ((cpus - taken), name);
CREATE TABLE columns.jobs (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, state text NOT NULL, worker text,
  cpus int NOT NULL, submitted_at timestamptz NOT NULL DEFAULT now(), finished_at timestamptz, args text NOT NULL
);
"""
#: Skips a row that another admission has locked: after a wait, the row would have another amount.
_ADMIT = """
WITH chosen AS (
  SELECT name FROM columns.workers WHERE cpus - taken >= %(asked)s ORDER BY cpus - taken, name LIMIT 1
  FOR UPDATE SKIP LOCKED
), changed AS (
  UPDATE columns.workers w SET taken = w.taken + %(asked)s FROM chosen c WHERE w.name = c.name RETURNING w.name
)
INSERT INTO columns.jobs (name, state, worker, cpus, args)
SELECT 'tasks.render', 'running', name, %(asked)s, repeat('x', 100) FROM changed RETURNING worker, id
"""
_RELEASE = """
WITH ended AS (
  UPDATE columns.jobs SET state = 'succeeded', finished_at = now() WHERE id = %s AND state = 'running'
  RETURNING worker, cpus
)
UPDATE columns.workers w SET taken = w.taken - e.cpus FROM ended e WHERE w.name = e.worker
"""


class Columns:
    """A table of workers, filled by hand, with a column for taken CPUs. One statement admits and makes the row."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._connection = connect(database_url)

    def load(self, cluster: Cluster) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(_TABLES)
            rows = [(name, CPUS, held) for name, held in cluster.held.items()]
            cursor.executemany("INSERT INTO columns.workers VALUES (%s, %s, %s)", rows)
            cursor.execute("VACUUM ANALYZE columns.workers")

    def apart(self) -> Columns:
        return Columns(self._url)

    def taken(self) -> int:
        with self._connection.cursor() as cursor:
            cursor.execute("SELECT sum(taken) FROM columns.workers")
            return int(cursor.fetchone()[0])

    def free(self) -> Mapping[str, int]:
        with self._connection.cursor() as cursor:
            cursor.execute("SELECT name, cpus - taken FROM columns.workers")
            return dict(cursor.fetchall())

    def admit(self) -> Held | None:
        with self._connection.cursor() as cursor:
            cursor.execute(_ADMIT, {"asked": ASKED})
            row = cursor.fetchone()
        return None if row is None else Held(row[0], str(row[1]))

    def release(self, held: Held) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(_RELEASE, (held.token,))

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
