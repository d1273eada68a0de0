"""Requests that no registered worker could hold: since when jobs wait for them, and which jobs have waited long enough.

Postgres has the capacities of the registered workers, whichever store decides. The tasks that a worker knows do not
count: a later worker may know more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import redis as redispy
from sqlalchemy import Connection, text

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.request import Request, terms_of
from celery_capacity.routing.policy.feasibility import Shortfall, find_shortfall
from celery_capacity.routing.policy.labels import named_worker
from celery_capacity.routing.policy.placement import Book, asked_shape

_REGISTERED: Final = text(
    "SELECT name, capacity, labels FROM ("
    " SELECT name, capacity, labels, row_number() OVER (PARTITION BY capacity, labels ORDER BY name) AS number"
    " FROM workers WHERE status NOT IN ('left', 'lost')"
    ") AS w WHERE number = 1 OR name = ANY(CAST(:named AS text[])) ORDER BY 1"
)
_WAITING: Final = text("SELECT DISTINCT shape FROM jobs WHERE state IN ('accepted', 'waiting') AND revoked_at IS NULL")
# A clock that nobody watched for a while starts anew: meanwhile a worker may have come and gone.
_NOTE: Final = text("""
WITH feasible AS (DELETE FROM infeasible WHERE shape <> ALL(CAST(:shapes AS text[])))
INSERT INTO infeasible AS i (shape) SELECT shape FROM unnest(CAST(:shapes AS text[])) AS x (shape)
ON CONFLICT (shape) DO UPDATE SET seen_at = now(),
  since = CASE WHEN i.seen_at < now() - make_interval(secs => :gap) THEN now() ELSE i.since END
RETURNING shape, since <= now() - make_interval(secs => :after)
""")
_STAYING: Final = text(
    "SELECT id FROM jobs WHERE behind = ANY(CAST(:filed AS text[])) AND behind IS NOT NULL AND state = 'waiting' "
    "ORDER BY seq LIMIT :most"
)
#: A job that became due later has waited only since then.
_LONG_ENOUGH: Final = (
    "state IN ('accepted', 'waiting') AND revoked_at IS NULL AND shape = ANY(CAST(:shapes AS text[])) "
    "AND greatest(submitted_at, due_at) <= now() - make_interval(secs => :after) ORDER BY seq LIMIT :most"
)
_THESE: Final = text(f"SELECT id, shape FROM jobs WHERE id = ANY(CAST(:ids AS text[])) AND {_LONG_ENOUGH}")
_ALL: Final = text(f"SELECT id, shape FROM jobs WHERE {_LONG_ENOUGH}")


def registered_workers(connection: Connection, shapes: Iterable[str] = ()) -> list[Book]:
    """Return a worker of each capacity with the same labels, of those that have neither left nor been given up.

    Also return the workers that one of these shapes names.
    """
    named = sorted({name for shape in shapes if (name := named_worker(terms_of(shape)))})
    rows = connection.execute(_REGISTERED, {"named": named})
    return [Book(name, amounts.from_people(capacity), {}, labels=labels) for name, capacity, labels in rows]


def waiting_in_ledger(client: redispy.Redis) -> dict[str, list[str]]:
    """Return the requests for which jobs wait in the ledger, with the shapes under which these are filed."""
    pipe = client.pipeline(transaction=False)
    pipe.zrange(keys.SHAPES, 0, -1)
    pipe.smembers(keys.WITHHELD)
    pipe.hkeys(keys.STAYING)
    filed: dict[str, list[str]] = defaultdict(list)
    for shape in sorted({snapshot.text(name) for names in pipe.execute() for name in names}):
        filed[asked_shape(shape)].append(shape)
    return dict(filed)


def waiting_in_postgres(connection: Connection) -> list[str]:
    """Return the requests for which rows wait."""
    return list(connection.execute(_WAITING).scalars())


def shortfalls(shapes: Iterable[str], registered: Sequence[Book]) -> dict[str, Shortfall]:
    """Return the requests that no registered worker could hold, each with the reason."""
    judged = ((shape, find_shortfall(Request.from_shape(shape), registered, terms_of(shape))) for shape in shapes)
    return {shape: shortfall for shape, shortfall in judged if shortfall is not None}


def note(connection: Connection, shapes: Iterable[str], after: float, gap: float) -> list[str]:
    """Note that these requests alone are infeasible now; return those that have been so for `after` seconds.

    `gap`: seconds without such a note after which the clock of a request starts anew.
    """
    values = {"shapes": sorted(shapes), "after": after, "gap": gap}
    return [shape for shape, is_over in connection.execute(_NOTE, values) if is_over]


def jobs_in_ledger(
    connection: Connection, client: redispy.Redis, filed: Mapping[str, Sequence[str]], after: float, most: int
) -> dict[str, str]:
    """Return jobs that wait for these requests, for `after` seconds at least: the request of each.

    `filed`: the shapes under which the jobs of each request are filed. Only the first `most` jobs of each are looked
    at, and as many that stay in Postgres.
    """
    if not filed:
        return {}
    names = [name for shapes in filed.values() for name in shapes]
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.zrange(keys.wait(name), 0, most - 1)
    ids = [snapshot.text(job) for jobs in pipe.execute() for job in jobs]
    ids += connection.execute(_STAYING, {"filed": names, "most": most}).scalars()
    return _requests(connection, _THESE, {"ids": ids, "shapes": list(filed), "after": after, "most": most})


def jobs_in_postgres(connection: Connection, shapes: Sequence[str], after: float, most: int) -> dict[str, str]:
    """Return at most `most` jobs whose rows wait for these requests, for `after` seconds at least: as above."""
    return _requests(connection, _ALL, {"shapes": list(shapes), "after": after, "most": most}) if shapes else {}


def _requests(connection: Connection, statement: Any, values: Mapping[str, Any]) -> dict[str, str]:
    return {row[0]: row[1] for row in connection.execute(statement, dict(values))}
