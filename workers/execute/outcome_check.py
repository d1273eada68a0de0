"""Ends of attempts about which Postgres is asked first.

A body that died or was stopped may have ended its job itself before. An attempt that was told that it lost its lease
says nothing of the job. Postgres is asked before the ledger is told, in a thread that may wait for Postgres.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import fencing

#: Outcome, from a worker's request, of an attempt whose body ended with `LeaseLost`. The ledger knows no such outcome.
LEASE_LOST: Final = "lease lost"
#: Outcomes, from a worker's request, of an attempt that was ended by a limit or failed after its `fenced` block, and of
#: an attempt whose process was ended by a revoke -> the outcome, if the attempt had not ended its job itself before.
BROKEN_OFF: Final = "broken off"
TERMINATED: Final = "terminated"
UNLESS_COMMITTED: Final = {
    Outcome.LOST: Outcome.LOST,
    Outcome.HANDED_BACK: Outcome.HANDED_BACK,
    BROKEN_OFF: Outcome.FAILED,
    TERMINATED: Outcome.CANCELLED,
}
#: Outcome, from a worker's request, of an attempt that had started, and is broken off since its worker ends.
STOPPED: Final = "stopped"
#: Outcomes that are judged.
JUDGED: Final = frozenset({LEASE_LOST, STOPPED, *UNLESS_COMMITTED})


def gone_back(rerun: bool) -> str:
    """Return the outcome of an attempt that had started and is not over: it goes back.

    If its job may start only once (`rerun=False`), the attempt is lost instead.
    """
    return Outcome.HANDED_BACK if rerun else Outcome.LOST


class BodyEnd(NamedTuple):
    """End of an attempt as the worker's request reports it."""

    job: str
    token: str
    outcome: str
    error: str | None
    outbox: Outbox


def judge(engine: Engine, end: BodyEnd, rerun: bool) -> BodyEnd:
    """Return the end of an attempt as the ledger is told it. `rerun`: False where the job may start only once.

    While Postgres does not answer, a lost attempt is lost, and an attempt that lost its lease goes back. Should the job
    have ended itself after all, its next attempt cannot commit, is told so, and comes here.
    """
    try:
        with engine.connect() as connection:
            if end.outcome != LEASE_LOST and fencing.close(connection, end.job, Token.parse(end.token)):
                return end._replace(outcome=Outcome.SUCCEEDED, error=None, outbox=Outbox())
            ended_as = fencing.final_state(connection, end.job)
    except SQLAlchemyError:
        ended_as = None
    if end.outcome in UNLESS_COMMITTED:
        return end._replace(outcome=UNLESS_COMMITTED[end.outcome])
    if end.outcome == STOPPED or ended_as is None:
        return end._replace(outcome=gone_back(rerun), outbox=Outbox())
    # The books are told that this attempt is over; the row stays as it is.
    error = f"the job had ended as {ended_as}: {end.error}"
    return end._replace(outcome=Outcome.CANCELLED, error=error, outbox=Outbox())
