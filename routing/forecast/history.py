"""Jobs that ended lately, as a trace: from the rows of jobs and from the archive.

A job that was archived before revision 0028 has no shape: it may run anywhere, and belongs to the default tenant. Reads
are bounded, the newest jobs first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.request import Request, holding, terms_of
from celery_capacity.routing.simulation.jobs import Submission

#: Jobs of a history: some minutes of a simulation, and 100 MB of memory.
MAX_JOBS: Final = 50_000

# A job comes when it is submitted, or due later. The time that it ran is that of its last attempt.
_ENDED: Final = text("""
SELECT * FROM (
  SELECT name, priority, queue, request, shape, expected_ms,
    (extract(epoch FROM greatest(submitted_at, due_at)) * 1000)::bigint AS came,
    (extract(epoch FROM finished_at - started_at) * 1000)::bigint AS run
  FROM jobs WHERE finished_at > now() - make_interval(secs => :span) AND started_at IS NOT NULL
    AND greatest(submitted_at, due_at) > now() - make_interval(secs => :span)
  UNION ALL
  SELECT name, priority, queue, request, shape, expected_ms,
    (extract(epoch FROM greatest(submitted_at, due_at)) * 1000)::bigint,
    (extract(epoch FROM finished_at - started_at) * 1000)::bigint
  FROM jobs_archive WHERE archived_at > now() - make_interval(secs => :span) AND started_at IS NOT NULL
    AND finished_at IS NOT NULL AND greatest(submitted_at, due_at) > now() - make_interval(secs => :span)
) AS ended ORDER BY came DESC LIMIT :most
""")


@dataclass(frozen=True)
class History:
    """Jobs in order of their arrival, in milliseconds since the first. `cut`: older ones of the span were left out."""

    jobs: Sequence[Submission]
    cut: bool


def read_history(connection: Connection, seconds: float, most: int = MAX_JOBS) -> History:
    """Return the jobs that came in the last seconds and have ended. Raise `InvalidRequest` where there is none."""
    rows = connection.execute(_ENDED, {"span": seconds, "most": most + 1}).all()
    if not rows:
        raise InvalidRequest(
            f"no job that came in the last {seconds:,.0f} s has run and ended",
            value=seconds,
            advice="Give a longer time, such as --from-history 30d, or a file: --trace FILE.",
        )
    ordered = sorted(rows[:most], key=lambda row: row.came)
    jobs = [_submission(number, row, ordered[0].came) for number, row in enumerate(ordered)]
    return History(jobs, len(rows) > most)


def _submission(number: int, row: Any, first: int) -> Submission:
    if row.shape is None:
        request, terms = Request.of(amounts.from_people(row.request)).within(row.queue), ""
    else:
        asked = holding(row.shape, 0)
        request, terms = Request.from_shape(asked), terms_of(asked)
    run, expected = max(1, row.run), row.expected_ms or 0
    return Submission(str(number), row.came - first, run, request, row.name, row.priority, terms, expected)
