"""Transitions that nobody has written to Postgres: those of senders, and of workers that died before their batch."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.model.states import FINAL
from celery_capacity.routing.recovery import rebuild, resubmit, transition_log
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.deliver_later import announcer_of, deliver_rows

#: Milliseconds left to a worker to write its own.
OLDER_THAN = 1000


def run_once(app: Celery, stores: Stores, older_than_ms: int = OLDER_THAN) -> dict[str, int]:
    """Write entries that are at least so old.

    Counts: `applied` entries, `continued` jobs with a successor that is due, `delivered` outboxes of theirs, jobs
    `carried` over from an older epoch that came in.
    """
    entries, applied = transition_log.apply_all(stores.engine, stores.ledger, older_than_ms=older_than_ms)
    continued = resubmit.go_on(stores.engine, stores.ledger, applied)
    if (announcer := announcer_of(app)) is not None:
        announcer.waiting(applied)
    ended = [one.job for one in applied if one.state in FINAL]
    delivered = deliver_rows(app, stores, ended) if ended else 0
    carried = rebuild.bring_in_carried(stores.engine, stores.ledger)
    return {"applied": entries, "continued": continued, "delivered": delivered, "carried": carried}
