"""Ends of attempts while Postgres decides: written there, guarded by their token, instead of released in the ledger."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.database import tenants
from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.insert import key_limits
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.states import Outcome, State, Step, Store
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.ends import Became
from celery_capacity.routing.policy.ends import became as became_of
from celery_capacity.routing.store import claims, dependencies, fencing, job_transitions, refused_transitions
from celery_capacity.routing.store.dependencies import Opened
from celery_capacity.routing.store.fencing import Holder
from celery_capacity.routing.store.job_transitions import Applied, Transition
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.claim_writer import running
from celery_capacity.workers.process.holdings import Holding
from celery_capacity.workers.process.stores import transactions
from celery_capacity.workers.traces import worker

logger = logging.getLogger(__name__)

#: Most ends written in one transaction.
MAX_ENDS: Final = 200
#: Text in the outbox of a job that left a chord part. Results may be kept apart from the outbox, chord parts never.
CHORD: Final = '"chord": "'


@dataclass(frozen=True, slots=True)
class End:
    """End of a body.

    `on_lost` is called when the job ended as lost: its result must say so. `whole` returns the outbox for Postgres,
    with the results that `ended` keeps apart. `refused`: the row does not belong to this attempt any more.
    """

    ended: Ended
    on_lost: Callable[[], None] | None = None
    whole: Callable[[], str] | None = None
    refused: bool = False


@dataclass(slots=True)
class Written:
    """Ends that are over for their worker, and their fates.

    `ends`: all of them. `refused`: their attempts no longer hold their jobs. `repeated`: their rows have an end of the
    same attempt already. `lost`: they ended their jobs as lost.
    """

    ends: list[End] = field(default_factory=list)
    refused: list[End] = field(default_factory=list)
    repeated: list[End] = field(default_factory=list)
    lost: list[End] = field(default_factory=list)

    def add(self, other: Written) -> None:
        self.ends += other.ends
        self.refused += other.refused
        self.repeated += other.repeated
        self.lost += other.lost


class PostgresEnds:
    """Writer of ends to Postgres, used by the ledger's thread alone.

    `on_room` is called after holdings were removed, `on_outbox` when rows have something to be delivered. Two others
    are called in a thread of the recorder's that may wait for a store: `on_chord_parts` with the jobs whose rows have
    chord parts, `tell_late` with (job, token, outbox) of an end that was not written.
    """

    def __init__(
        self,
        context: WorkerContext,
        on_room: Callable[[], None],
        on_outbox: Callable[[], None],
        on_chord_parts: Callable[[Sequence[str]], None],
        tell_late: Callable[[str, Token, str], None],
    ) -> None:
        self._engine = context.engine
        self._transactions = transactions(context.engine)
        self._settings = context.settings
        self._identity = context.identity
        self._confirmation = context.confirmation
        self._holdings = context.holdings
        self._later = context.recorder.call
        self._on_room = on_room
        self._on_outbox = on_outbox
        self._on_chord_parts = on_chord_parts
        self.tell_late = tell_late
        self._warning = LastingWarning(logger)
        self._tally = context.ledger.tally

    @property
    def decides(self) -> bool:
        """Return True if Postgres decides, as far as this process knows.

        The answer need not be sure: the token guards the row, whichever store decides.
        """
        return self._confirmation.authority == Store.POSTGRES

    def settle(self, ends: deque[End], arrivals: deque[Any]) -> bool:
        """Write ends; unwritten ends stay pending. Return False where there was nothing that it could do."""
        # Arrivals are messages of the old books: nobody can claim them, and their rows go back.
        dropped = len(arrivals)
        arrivals.clear()
        batch = [ends[i] for i in range(min(MAX_ENDS, len(ends)))]
        if not batch:
            return dropped > 0
        try:
            written = self._write_all(batch)
        except SQLAlchemyError as error:
            self._warning.warn(f"Postgres does not take what ended, it is kept: {type(error).__name__}")
            return False
        self._warning.over()
        for _ in batch:
            ends.popleft()
        # An end whose row is locked, or that Postgres refuses, goes behind all others, so that it delays none of them.
        done = set(map(id, written.ends))
        ends.extend(end for end in batch if id(end) not in done)
        if not written.ends:
            return dropped > 0
        self._after(written)
        return True

    def _after(self, written: Written) -> None:
        traces = worker.of(self._identity.incarnation)
        for end in written.ends:
            self._holdings.remove(end.ended.job, end.ended.token)
            if traces is not None:
                traces.stored(end.ended)
        for end in written.refused:
            logger.warning(
                "job %s: attempt %s no longer held its lease; its end (%s) is refused",
                end.ended.job,
                end.ended.token,
                end.ended.outcome,
            )
        self._tally.add(Refusal.STALE_RELEASE, len(written.refused))
        for end in [*written.refused, *written.repeated]:
            # Another process closed the end of a job that had ended itself, and did not know the job's value.
            if end.ended.outcome == Outcome.SUCCEEDED and (left := left_by(end)):
                self._later(partial(self.tell_late, end.ended.job, end.ended.token, left))
        for end in written.lost:
            if end.on_lost is not None:
                self._later(end.on_lost)
        self._on_room()
        if any(end.whole or end.ended.outbox for end in written.ends):
            self._on_outbox()
        if chord_jobs := [end.ended.job for end in written.ends if CHORD in end.ended.outbox]:
            self._later(partial(self._on_chord_parts, chord_jobs))

    def _write_all(self, batch: Sequence[End]) -> Written:
        """Write ends, so that a refused end holds up no other job; return the written ends.

        Raises an error that concerns the whole store.
        """
        try:
            return self._write(batch)
        except Exception as error:
            if is_locked(error):
                return self._write_free(batch, error)
            if not refused_transitions.concerns_data(error):
                raise
            if len(batch) == 1:
                return self._write_bad(batch[0])
        half = len(batch) // 2
        written = self._write_all(batch[:half])
        written.add(self._write_all(batch[half:]))
        return written

    def _write_free(self, batch: Sequence[End], error: Exception) -> Written:
        """Write the ends of jobs whose rows nobody keeps locked."""
        with self._transactions.begin() as connection:
            free = job_transitions.free(connection, [end.ended.job for end in batch])
        writable = [end for end in batch if end.ended.job in free]
        if len(writable) == len(batch):
            # The locked row was free again just now, or a whole table is locked.
            raise error
        return self._write_all(writable) if writable else Written()

    def _write_bad(self, end: End) -> Written:
        """Write an end that Postgres does not take as it is (`routing.store.refused_transitions`)."""
        with self._transactions.begin() as connection:
            rows = fencing.lock_holders(connection, [end.ended.job])
            written, transitions = self._judge([end], rows, claims.now_ms(connection))
        applied, left = refused_transitions.write(self._engine, self._tally, transitions)
        if left:
            return Written()
        if _starts(applied):
            self._wake()
        self._open_needs(applied)
        return written

    def _write(self, batch: Sequence[End]) -> Written:
        """Write ends in one transaction, and wake workers if jobs may start now."""
        with self._transactions.begin() as connection:
            rows = fencing.lock_holders(connection, [end.ended.job for end in batch])
            written, transitions = self._judge(batch, rows, claims.now_ms(connection))
            applied = job_transitions.apply(connection, transitions)
            ended = [transition.job for transition in transitions]
            if _starts(applied) or (ended and tenants.have_quota(connection, ended)):
                claims.wake(connection)
        self._open_needs(applied)
        return written

    def _judge(self, batch: Sequence[End], rows: Mapping[str, Holder], now: int) -> tuple[Written, list[Transition]]:
        """Return the fates of these ends, and the transitions of their jobs."""
        held = {holding.key: holding for holding in self._holdings.all()}
        written, transitions = Written(list(batch)), list[Transition]()
        for end in batch:
            row = rows.get(end.ended.job)
            holding = held.get((end.ended.job, end.ended.token))
            if row is not None and holding is not None and row.takes(end.ended.token):
                transitions.append(self._transition(end, holding, row, now))
                if transitions[-1].state == State.LOST:
                    written.lost.append(end)
            elif row is None or not row.has(end.ended.token):
                written.refused.append(end)
            else:
                written.repeated.append(end)
        return written, transitions

    def _wake(self) -> None:
        try:
            with self._transactions.begin() as connection:
                claims.wake(connection)
        except SQLAlchemyError as error:
            logger.info("the workers were not told that there are jobs to take: %s", error)

    def _open_needs(self, applied: Sequence[Applied]) -> None:
        """Bring in jobs that waited for these ends, or for a key of theirs. A duty does so where this fails."""
        awaited = any(change.awaited for change in applied)
        if not (awaited or any(change.limited for change in applied)):
            return
        try:
            opened = dependencies.open_needs(self._transactions) if awaited else Opened()
            if [*opened.due, *key_limits.open_noted(self._transactions)]:
                self._wake()
        except SQLAlchemyError as error:
            logger.info("left to the duties: %s", error)
            return
        if opened.cancelled:
            self._on_outbox()

    def _transition(self, end: End, holding: Holding, row: Holder, now: int) -> Transition:
        ended = end.ended
        became: Became = became_of(ended.outcome, row.losses, self._settings.most_losses, row.rerun)
        back = became.step == Step.BACK and ended.outcome not in (Outcome.RETRIED, Outcome.REQUEUED)
        return replace(
            running(self._identity, holding),
            state=became.state,
            step=became.step,
            at_ms=now,
            losses=became.losses,
            outcome=ended.outcome,
            error=ended.error or "",
            # A job that runs again has nothing to deliver, except a retry that it published itself.
            outbox="" if back else left_by(end),
            told=ended.told,
        )


def left_by(end: End) -> str:
    """Return the whole outbox of an end, with the results that are kept apart."""
    return end.whole() if end.whole is not None else end.ended.outbox


def _starts(applied: Sequence[Applied]) -> bool:
    return any(change.due or change.state == State.ACCEPTED for change in applied)
