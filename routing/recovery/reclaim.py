"""Take back the jobs of a lost worker: first in Postgres, then in the ledger.

Postgres comes first, so that no later act of the worker has an effect. If it wakes up, the commits and publishes of its
attempts are refused from then on, and a job that had committed does not run again. Where Postgres does not answer,
nothing is taken back yet.
"""

from __future__ import annotations

from sqlalchemy import Engine

from celery_capacity.routing.ledger import snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Lapsed, LapseVerdict
from celery_capacity.routing.model.states import Step, WorkerStatus
from celery_capacity.routing.recovery import transition_log
from celery_capacity.routing.store import fencing, worker_rows


def take_back(engine: Engine, ledger: Ledger, worker: str, incarnation: str, grace_ms: int) -> Lapsed:
    """Give up an incarnation of a worker whose lease ran out `grace_ms` ago.

    The call is idempotent, and several callers may make it at once.

    Return `waits` where Postgres cannot take an attempt of the worker yet: the worker keeps that attempt, and loses all
    others.
    """
    with engine.connect() as connection:
        worker_rows.end_worker(connection, incarnation, WorkerStatus.LOST)
        # First the claims that only the stream has. A claim that Postgres cannot take now could not be given up, though
        # its attempt may be committing just now: that job is taken back once its claim is there. The others go at once.
        transition_log.apply_all(engine, ledger)
        left = {
            transition.job
            for transition in transition_log.unapplied(ledger)
            if transition.incarnation == incarnation and transition.step < Step.ENDED
        }
        left |= fencing.give_up(connection, incarnation)
        for job, token in fencing.committed(connection, incarnation):
            # A committed job too is closed only once the stream has no entry of it.
            if not ledger.remove_job(job, token, final=True) and _is_held(ledger, job, worker):
                left.add(job)
            else:
                fencing.close(connection, job, token)
    lapsed = ledger.lapse(worker, grace_ms, ledger.settings.most_losses, without=left)
    if (lapsed.verdict, lapsed.incarnation) == (LapseVerdict.ALIVE, incarnation):
        # The worker renewed its lease just now: its next attempts may speak. Its present ones may not commit any more.
        with engine.connect() as connection:
            worker_rows.revive_worker(connection, incarnation)
    return lapsed


def _is_held(ledger: Ledger, job: str, worker: str) -> bool:
    card = snapshot.read_cards(ledger.client, [job]).get(job)
    return card is not None and not card.is_tombstone and card.worker == worker
