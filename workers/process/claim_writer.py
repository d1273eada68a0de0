"""Claims of a worker as transitions for Postgres, and the write that a start waits for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.model.job import Publisher
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.request import Request, number_held
from celery_capacity.routing.model.states import State, Step
from celery_capacity.routing.store import fencing, job_transitions
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.process.holdings import Holding
from celery_capacity.workers.process.identity import Identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message of this worker's queue: its tag, its request, and the message itself."""

    tag: Tag
    request: Request
    message: Any
    nonce: str


def running(identity: Identity, holding: Holding, entry: str = "") -> Transition:
    """Return the transition that says that an attempt runs on this worker."""
    return Transition(
        job=holding.job,
        token=holding.token,
        state=State.RUNNING,
        step=Step.RUNNING,
        worker=identity.name,
        incarnation=identity.incarnation,
        admitted_ms=holding.admitted_ms,
        started_ms=holding.started_ms,
        at_ms=holding.started_ms,
        losses=holding.losses,
        entry=entry,
        shape=holding.filed if number_held(holding.filed) else "",
    )


def write(engine: Engine, claim: Transition) -> bool | None:
    """Write a claim to Postgres, and return True if Postgres has it.

    Returns False if the row says that another attempt is newer, or that the job is over. Returns None where Postgres
    does not take the claim now. Idempotent: a commit whose answer was lost is found.
    """
    try:
        applied, left = job_transitions.apply_unlocked(engine, [claim])
        if left:
            logger.warning("job %s starts when Postgres has its claim: its row is locked", claim.job)
            return None
        if applied:
            return True
        with engine.connect() as connection:
            return fencing.runs(connection, Publisher(claim.job, claim.token, claim.incarnation))
    except SQLAlchemyError as error:
        logger.warning("job %s starts when Postgres has its claim: %s", claim.job, type(error).__name__)
        return None
