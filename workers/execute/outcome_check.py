"""Ends of attempts about which Postgres is asked first.

A body that died or was stopped may have ended its job itself before. An attempt that was told that it lost its lease
says nothing of the job. Postgres is asked before the ledger is told, in a thread that may wait for Postgres.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import fencing


class Ambiguous(StrEnum):
    """End of a body that does not say how its attempt ended. The ledger knows none of these words."""

    #: with `LeaseLost`
    LEASE_LOST = "lease lost"
    #: by a limit, or by a failure after its `fenced` block
    BROKEN_OFF = "broken off"
    #: with its process, by a revoke
    TERMINATED = "terminated"
    #: it had started, and its worker ends
    STOPPED = "stopped"


#: End of a body -> the outcome of its attempt, if the attempt had not ended its job itself before.
UNLESS_COMMITTED: Final[Mapping[Outcome | Ambiguous, Outcome]] = {
    Outcome.LOST: Outcome.LOST,
    Outcome.HANDED_BACK: Outcome.HANDED_BACK,
    Outcome.REQUEUED: Outcome.REQUEUED,
    Ambiguous.BROKEN_OFF: Outcome.FAILED,
    Ambiguous.TERMINATED: Outcome.CANCELLED,
}
#: Ends that are judged.
JUDGED: Final = frozenset({*Ambiguous, *UNLESS_COMMITTED})


def gone_back(rerun: bool) -> Outcome:
    """Return the outcome of a started attempt that does not end its job: handed back, or lost without `rerun`.

    Without `rerun` the job may start only once.
    """
    return Outcome.HANDED_BACK if rerun else Outcome.LOST


class BodyEnd(NamedTuple):
    """End of an attempt as the worker's request reports it."""

    job: str
    token: Token
    outcome: Outcome | Ambiguous
    error: str | None
    outbox: Outbox


def judge(engine: Engine, end: BodyEnd, rerun: bool) -> BodyEnd:
    """Return the end of an attempt for the ledger. `rerun`: False where the job may start only once.

    While Postgres does not answer, a lost attempt is lost, and an attempt that lost its lease goes back. If the job had
    ended itself all the same, its next attempt cannot commit: it gets `LeaseLost`, and is judged in turn.
    """
    try:
        with engine.connect() as connection:
            if end.outcome is not Ambiguous.LEASE_LOST and fencing.close(connection, end.job, end.token):
                return end._replace(outcome=Outcome.SUCCEEDED, error=None, outbox=Outbox())
            ended_as = fencing.final_state(connection, end.job)
    except SQLAlchemyError:
        ended_as = None
    if end.outcome in UNLESS_COMMITTED:
        return end._replace(outcome=UNLESS_COMMITTED[end.outcome])
    if end.outcome is Ambiguous.STOPPED or ended_as is None:
        return end._replace(outcome=gone_back(rerun), outbox=Outbox())
    # The books need to know that this attempt is over; the row stays as it is.
    error = f"the job had ended as {ended_as}: {end.error}"
    return end._replace(outcome=Outcome.CANCELLED, error=error, outbox=Outbox())
