"""Running jobs of some workers, with what each of them holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, text

from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.missing import Running
from celery_capacity.routing.policy.placement import held_by

#: Most jobs that are read, those of the first workers by name.
MAX_JOBS: Final = 5000

_RUNNING: Final = text("""
SELECT worker, id, shape, losses, extract(epoch FROM coalesce(started_at, admitted_at, submitted_at))::float
FROM jobs WHERE state IN ('admitted', 'running') AND worker = ANY(CAST(:workers AS text[]))
ORDER BY worker, id LIMIT :most
""")


def on_workers(connection: Connection, workers: Sequence[str], most_losses: int) -> dict[str, list[Running]]:
    """Return the jobs that these workers hold, by worker. `most_losses`: lost attempts after which a job ends."""
    held: dict[str, list[Running]] = defaultdict(list)
    if workers:
        for worker, job, shape, losses, since in connection.execute(
            _RUNNING, {"workers": list(workers), "most": MAX_JOBS}
        ):
            request = held_by(Request.from_shape(shape), losses, most_losses)
            held[worker].append(Running(job, request, since))
    return dict(held)
