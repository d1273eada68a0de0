"""The end of a replaced job: the job ends with its replacement, however that ends.

A task that replaces itself by a chain, a group or a chord (`Task.replace`) ends at once. Its job's row is `replaced`
and holds nothing. Only the last step of the replacement carries the job's id: once that step is published, the row goes
on with it (`successors.put_successor`). Each step names the job in whose replacement it is (the column `replaces`). A
step is a row before the attempt that publishes it has ended.

A replacement is alive while one of its steps has not ended or has something to deliver, since a chord part may publish
the body. A replacement that is not alive will publish nothing more. Its job ends like the step that stood in its way. A
step that is replaced itself is such a row, too: it ends first.

Any repair of a job repairs a crash in between, since steps are jobs. An attempt that dies after it published its
replacement is lost. The next attempt publishes a replacement of its own, and Celery gives its inner steps new ids. The
replacement that comes first to its last step goes on with the job; the other's last step is there already.

The check runs after each end of a step (`routing.store.job_transitions`, `workers.results.deliver_later`), and in a
duty for all replaced jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, text

from celery_capacity.routing.model.outbox import UNLESS_TOLD
from celery_capacity.routing.model.states import FINAL, State, Step

#: Rows ended in one statement.
MAX_ROWS: Final = 1000
_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))
#: Error of a job whose replacement did nothing wrong and yet did not come to its last step.
NO_STEP: Final = "its replacement ended before its last step (a step ignored or rejected itself, say)"

# A step's error may end with a traceback; its first line is enough here.
_END: Final = text(f"""
WITH gone AS (
  SELECT r.id FROM jobs r
  WHERE r.state = '{State.REPLACED.value}' AND (CAST(:ids AS text[]) IS NULL OR r.id = ANY(CAST(:ids AS text[])))
    AND NOT EXISTS (SELECT 1 FROM jobs s WHERE s.replaces = r.id AND s.id <> r.id
      AND (s.state NOT IN ({_FINAL}) OR s.outbox IS NOT NULL))
  ORDER BY r.id LIMIT :most FOR NO KEY UPDATE OF r SKIP LOCKED
), why AS (
  SELECT DISTINCT ON (gone.id) gone.id, s.state, 'its replacement ended without it: job ' || s.id || ' (' || s.name
    || ') is ' || s.state || coalesce(': ' || nullif(split_part(s.error, chr(10), 1), ''), '') AS error
  FROM gone LEFT JOIN jobs s ON s.replaces = gone.id AND s.id <> gone.id AND s.state IN ({_FINAL})
    AND s.state <> '{State.SUCCEEDED.value}'
  ORDER BY gone.id, s.finished_at DESC
)
UPDATE jobs SET state = coalesce(why.state, '{State.FAILED.value}'), error = coalesce(why.error, '{NO_STEP}'),
  step = {Step.DROPPED.value}, finished_at = clock_timestamp(), outbox = '{UNLESS_TOLD}'
FROM why WHERE jobs.id = why.id AND jobs.state = '{State.REPLACED.value}'
RETURNING jobs.id
""")


def end_abandoned(connection: Connection, ids: Sequence[str] | None = None) -> list[str]:
    """End the replaced jobs (of `ids`, or of all) whose replacement is not alive; return their ids.

    Their results are to be delivered, where Celery has not told them with the end of the step.
    """
    if ids is not None and not ids:
        return []
    values = {"ids": None if ids is None else sorted(set(ids)), "most": MAX_ROWS}
    return list(connection.execute(_END, values).scalars())
