"""Write transitions to Postgres that senders left in the stream, or workers that died before their batch."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.model.states import FINAL
from celery_capacity.routing.recovery import rebuild, resubmit, transition_log
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.deliver_later import announcer_of, deliver_rows

#: Milliseconds for which a transition is left to its own worker to write.
OLDER_THAN = 1000


def run_once(app: Celery, stores: Stores, older_than_ms: int = OLDER_THAN) -> dict[str, int]:
    """Write the transitions that are at least `older_than_ms` old to Postgres, and go on with their jobs.

    Counts: `applied` entries of the stream, `continued` jobs with a successor that is due, `delivered` outboxes of
    ended jobs, jobs `carried` over from an older epoch that came in.
    """
    entries, applied = transition_log.apply_all(stores.engine, stores.ledger, older_than_ms=older_than_ms)
    continued = resubmit.go_on(stores.engine, stores.ledger, applied)
    if (announcer := announcer_of(app)) is not None:
        announcer.waiting(applied)
    ended = [transition.job for transition in applied if transition.state in FINAL]
    delivered = deliver_rows(app, stores, ended) if ended else 0
    carried = rebuild.bring_in_carried(stores.engine, stores.ledger)
    return {"applied": entries, "continued": continued, "delivered": delivered, "carried": carried}
