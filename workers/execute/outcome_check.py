"""Ends of attempts about which Postgres is asked first.

A body that died or was stopped may have ended its job itself before. An attempt that was told that it lost its lease
says nothing of the job. Postgres is asked before the ledger is told, in a thread that may wait for Postgres.
"""

from __future__ import annotations

from typing import Final

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


def judge(
    engine: Engine, job: str, token: str, outcome: str, error: str | None, outbox: Outbox, rerun: bool
) -> tuple[str, str, str, str | None, Outbox]:
    """Return the end of an attempt as the ledger is told it. `rerun`: False where the job may start only once.

    While Postgres does not answer, a lost attempt is lost, and an attempt that lost its lease goes back. Should the job
    have ended itself after all, its next attempt cannot commit, is told so, and comes here.
    """
    try:
        with engine.connect() as connection:
            if outcome != LEASE_LOST and fencing.close(connection, job, Token.parse(token)):
                return job, token, Outcome.SUCCEEDED, None, Outbox()
            ended_as = fencing.final_state(connection, job)
    except SQLAlchemyError:
        ended_as = None
    if outcome in UNLESS_COMMITTED:
        return job, token, UNLESS_COMMITTED[outcome], error, outbox
    if outcome == STOPPED or ended_as is None:
        return job, token, gone_back(rerun), error, Outbox()
    # The books are told that this attempt is over; the row stays as it is.
    return job, token, Outcome.CANCELLED, f"the job had ended as {ended_as}: {error}", Outbox()
