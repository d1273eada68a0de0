"""Progress of a running attempt in its job's row: the newest that the attempt reported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.model.job import Publisher
from celery_capacity.routing.model.states import Step

#: Condition on the row: no newer attempt is known, and this one was neither taken back nor given up.
_WRITE: Final = text(f"""
UPDATE jobs SET progress = CAST(:progress AS jsonb)
WHERE id = :job AND finished_at IS NULL
  AND (epoch, attempt, CASE step WHEN {Step.GIVEN_UP.value} THEN {Step.BACK.value} ELSE step END)
    < (:epoch, :attempt, {Step.BACK.value})
  AND (progress IS NULL OR ((progress->>'epoch')::bigint, (progress->>'attempt')::int) <= (:epoch, :attempt))
  AND NOT EXISTS (SELECT FROM workers w WHERE w.incarnation = :incarnation AND w.status = 'lost')
""")


def write_progress(connection: Connection, by: Publisher, progress: Mapping[str, Any]) -> bool:
    """Write the progress that an attempt reports; return False where the attempt no longer holds its job."""
    token = by.token.columns()
    values = {
        **token,
        "job": by.job,
        "incarnation": by.incarnation,
        "progress": json.dumps({**token, **progress}),
    }
    return connection.execute(_WRITE, values).rowcount == 1
