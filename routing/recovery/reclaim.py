"""Taking back the jobs of a worker that is lost: first in Postgres, then in the ledger.

Postgres first, so that nothing which the worker still does has an effect: should it wake up, what its attempts commit
or publish is refused from then on, and what they had committed does not run again. Where Postgres does not answer,
nothing is taken back yet.
"""

from __future__ import annotations

from sqlalchemy import Engine

from celery_capacity.routing.ledger import snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Lapsed
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.recovery import transition_log
from celery_capacity.routing.store import fencing, worker_rows


def take_back(engine: Engine, ledger: Ledger, worker: str, incarnation: str, grace_ms: int) -> Lapsed:
    """Give a life of a worker up, whose lease ran out `grace_ms` ago. Safe to do again, and by several at once. `waits`
    where Postgres cannot be told yet of an attempt that it has: the worker keeps that one, and loses all others."""
    with engine.connect() as connection:
        worker_rows.end_worker(connection, incarnation, "lost")
        # The claims of which only the stream knows yet. One that Postgres cannot take now could not be given up, though
        # its attempt may be committing just now: that job is not taken back before it is there. The others are.
        transition_log.apply_all(engine, ledger)
        left = {
            one.job
            for one in transition_log.unapplied(ledger)
            if one.incarnation == incarnation and one.step < Step.ENDED
        }
        left |= fencing.give_up(connection, incarnation)
        for job, epoch, attempt in fencing.committed(connection, incarnation):
            # (Here too only once the stream has nothing of it.)
            if not ledger.drop(job, f"{epoch}.{attempt}", final=True) and _is_held(ledger, job, worker):
                left.add(job)
            else:
                fencing.close(connection, job, epoch, attempt)
    found = ledger.lapse(worker, grace_ms, ledger.settings.most_losses, without=left)
    if (found.verdict, found.incarnation) == ("alive", incarnation):
        # It renewed its lease just now: its next attempts may speak. (Those that it has may not commit any more.)
        with engine.connect() as connection:
            worker_rows.revive_worker(connection, incarnation)
    return found


def _is_held(ledger: Ledger, job: str, worker: str) -> bool:
    card = snapshot.read_cards(ledger.client, [job]).get(job)
    return card is not None and card.state != "ended" and card.worker == worker
