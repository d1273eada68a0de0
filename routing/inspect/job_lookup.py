"""Find a job by the beginning of its id, or name ids like a wrong one."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Final

from sqlalchemy import Connection, TableClause, func, select

from celery_capacity.routing.database import schema
from celery_capacity.routing.inspect.job_list import JobFilter, newest

#: Fewest leading characters by which a job is found, and that two similar ids must share.
SHORTEST_PREFIX: Final = 4
#: Rows of the index that a search by a prefix reads.
EXAMINED: Final = 64
#: Ids that are named for an ambiguous prefix.
NAMED: Final = 5
#: Newest jobs that are searched for an id like the wrong one.
LOOKED_AT: Final = 2000
#: Similarity of an id with a typing error, by difflib, 0 to 1. Two random UUIDs have some 0.5.
SIMILAR: Final = 0.8


def with_prefix(connection: Connection, prefix: str) -> list[str]:
    """Return the ids with this prefix, at most `NAMED`, of jobs and of archived jobs; [] for a very short prefix."""
    if len(prefix) < SHORTEST_PREFIX:
        return []
    ids = [job for table in (schema.jobs, schema.jobs_archive) for job in _with_prefix(connection, table, prefix)]
    return list(dict.fromkeys(ids))[:NAMED]


def _with_prefix(connection: Connection, table: TableClause, prefix: str) -> list[str]:
    """Return ids of a table with this prefix.

    In the index they come right after the prefix itself, whatever the collation of the database. An upper bound for a
    range would depend on the collation.
    """
    follow = select(table.c.id).where(table.c.id >= prefix).order_by(table.c.id).limit(EXAMINED).subquery()
    query = select(follow.c.id).where(func.starts_with(follow.c.id, prefix)).order_by(follow.c.id).limit(NAMED)
    return list(connection.execute(query).scalars())


def nearest(connection: Connection, job: str, most: int = 3) -> list[str]:
    """Return ids that a person may have meant, the likeliest first.

    They are ids of the newest jobs that begin like `job`, or are much like it as a whole.
    """
    # A job that changes its state during the search may be in the list twice.
    recent = list(dict.fromkeys(str(line["id"]) for line in newest(connection, JobFilter(), LOOKED_AT).lines))
    begun = {candidate: _agree(candidate, job) for candidate in recent}
    alike = [candidate for candidate in recent if begun[candidate] >= min(SHORTEST_PREFIX, len(job))]
    alike.sort(key=lambda candidate: -begun[candidate])
    similar = get_close_matches(job, recent, n=most, cutoff=SIMILAR)
    return list(dict.fromkeys([*alike, *similar]))[:most]


def _agree(left_id: str, right_id: str) -> int:
    """Return the number of leading characters that two ids have in common."""
    for position, (left, right) in enumerate(zip(left_id, right_id, strict=False)):
        if left != right:
            return position
    return min(len(left_id), len(right_id))
