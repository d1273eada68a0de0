"""Limits by key: at most so many jobs of a key at once, and so many starts of a key in a time, in the whole cluster.

The row of a job has its limits (`jobs.key_limits`). A job that its keys hold back is `scheduled` without a time
(`due_at` is null). It is in no ledger, and holds nothing. A job *holds* its keys from the time at which it may start
until its attempt has ended: while it is on its way, waits for a worker, or runs. Between two attempts of `retry`, and
after `Task.replace`, it holds none, because nothing of it runs.

How an end reaches the next job of a key, and what a crash leaves::

    the transaction of the end    a trigger takes the job's rows out of `job_keys` and notes its keys in `key_notes`,
                                  for every writer (`file_job_keys`, migration 0019). A retry, a revoke, an expiry and
                                  a lost job are such writers too
    a crash here                  the duty finds the notes within its interval
    `open_noted`                  deletes notes, and lets jobs of these keys go, in one transaction
    a crash here                  a job that got its time is due, and the duty brings it in

Only `open_lines` (migration 0019) gives jobs their time. It counts the holders under a lock of each key, from the rows
of `job_keys`, which change in the transactions of their jobs. So the holders can become fewer at any time, and more
under the lock alone.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

from sqlalchemy import Connection, Engine, text

from celery_capacity.routing.insert.single import OPEN_KEYS

#: Notes taken, and jobs let go, in one transaction.
CHUNK: Final = 500
#: Lines of jobs that one pass of the duty looks at: those that a rate holds back, and as many others in turn.
MAX_LINES: Final = 500
#: Seconds of a rate for which starts are saved up, where an end lets jobs go.
BURST: Final = 1.0

_TAKE_NOTES: Final = text("""
WITH taken AS (
  DELETE FROM key_notes WHERE seq = ANY(ARRAY(
    SELECT seq FROM key_notes ORDER BY seq LIMIT :most FOR UPDATE SKIP LOCKED))
  RETURNING key
) SELECT count(*), array_agg(DISTINCT key) FROM taken
""")
#: True if a job waits for its keys, or its time has come.
_ANY_WAITS: Final = text("""
SELECT EXISTS (SELECT FROM job_keys WHERE phase = 'waits' AND number = 1)
  OR EXISTS (SELECT FROM job_keys WHERE phase = 'later' AND number = 1 AND not_before <= clock_timestamp())
""")
# A locked row is left for the next pass. Its writer files it anew.
_COME: Final = text("""
UPDATE job_keys SET phase = 'waits' WHERE phase = 'later' AND job = ANY(ARRAY(
  SELECT job FROM job_keys WHERE phase = 'later' AND number = 1 AND not_before <= clock_timestamp()
  ORDER BY not_before LIMIT :most FOR UPDATE SKIP LOCKED))
RETURNING line
""")
# Takes one step along the index for each line, however many jobs wait in it.
_LINES: Final = """
WITH RECURSIVE lines AS (
  (SELECT line, 1 AS n FROM job_keys WHERE phase = 'waits' AND number = 1 {also} AND line > :start
    ORDER BY line LIMIT 1)
  UNION ALL
  SELECT following.line, lines.n + 1 FROM lines CROSS JOIN LATERAL (
    SELECT k.line FROM job_keys k WHERE phase = 'waits' AND number = 1 {also} AND k.line > lines.line
    ORDER BY k.line LIMIT 1
  ) AS following WHERE lines.n < :most
) SELECT line FROM lines
"""
_ANY_LINES: Final = text(_LINES.format(also=""))
_PACED_LINES: Final = text(_LINES.format(also="AND paced"))
_OPEN_LINES: Final = text("SELECT open_lines(CAST(:lines AS text[]), :burst, :most)")


def open_noted(engine: Engine, burst: float = BURST) -> list[str]:
    """Let the jobs go that have room since other jobs let go of their keys; return their ids. They are due."""
    went: list[str] = []
    transactions = engine.execution_options(isolation_level="READ COMMITTED")
    while True:
        with transactions.begin() as connection:
            taken, keys = connection.execute(_TAKE_NOTES, {"most": CHUNK}).one()
            if keys:
                went += _open(connection, OPEN_KEYS, {"keys": keys, "burst": burst})
        if taken < CHUNK:
            return went


def open_all(engine: Engine, burst: float) -> list[str]:
    """Let all jobs go that their keys let start now, for any reason; return their ids. They are due.

    A pass also looks at some lines that no note names: those whose time has come or that a rate holds back, and some
    from a random one on.
    """
    went = open_noted(engine, burst)
    with engine.connect() as connection:
        if not connection.execute(_ANY_WAITS).scalar_one():
            return went
    transactions = engine.execution_options(isolation_level="READ COMMITTED")
    with transactions.begin() as connection:
        lines = set(connection.execute(_COME, {"most": CHUNK}).scalars())
    with transactions.begin() as connection:
        for statement, start in ((_PACED_LINES, ""), (_PACED_LINES, secrets.token_hex(16)), (_ANY_LINES, "")):
            lines.update(connection.execute(statement, {"start": start, "most": MAX_LINES}).scalars())
        lines.update(connection.execute(_ANY_LINES, {"start": secrets.token_hex(16), "most": MAX_LINES}).scalars())
    ordered = sorted(lines)
    for begin in range(0, len(ordered), CHUNK):
        with transactions.begin() as connection:
            went += _open(connection, _OPEN_LINES, {"lines": ordered[begin : begin + CHUNK], "burst": burst})
    return went


# A row that is made anew counts from now on, as one that lies in the past does.
_FORGET: Final = text("""
DELETE FROM key_rates WHERE key = ANY(ARRAY(
  SELECT r.key FROM key_rates r WHERE r.next_at < now() - make_interval(secs => :age)
    AND NOT EXISTS (SELECT FROM job_keys k WHERE k.key = r.key AND k.phase = 'waits')
    AND NOT EXISTS (SELECT FROM job_keys k WHERE k.key = r.key AND k.phase = 'holds') LIMIT :most))
""")


def forget_rates(connection: Connection, age: float) -> int:
    """Delete the pace of keys that no job has, where a start has been free for `age` seconds; return how many."""
    return connection.execute(_FORGET, {"age": age, "most": CHUNK}).rowcount


def _open(connection: Connection, statement: Any, values: dict[str, Any]) -> list[str]:
    """Execute a statement that lets jobs go until it leaves none."""
    went: list[str] = []
    while True:
        ids = connection.execute(statement, {**values, "most": CHUNK}).scalars().all()
        went += ids
        if len(ids) < CHUNK:
            return went
