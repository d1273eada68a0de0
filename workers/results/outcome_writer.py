"""Writer of outcomes to Postgres: in batches, from a thread of its own, so that nothing waits for the database.

Until they are written, transitions are in two places: here, and in the ledger's stream. A transition whose row somebody
keeps locked is put off and retried later. The transitions behind it go on, since rows take them in any order.

The number of unwritten transitions is bounded. While Postgres has taken nothing for too long, or too much is unwritten,
the recorder is *behind*. Then its worker starts nothing more, since a new body would only add to the arrears.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.recovery import resubmit, transition_log
from celery_capacity.routing.store import refused_transitions
from celery_capacity.routing.store.job_transitions import Applied, Transition
from celery_capacity.workers.process import claim_writer
from celery_capacity.workers.results.batch_thread import BatchThread, Left
from celery_capacity.workers.results.store_calls import StoreCalls

logger = logging.getLogger(__name__)

#: Seconds for which a batch is collected.
BATCH_WITHIN: Final = 0.02
#: Most transitions written in one statement.
MAX_TRANSITIONS: Final = 1000
#: Unwritten transitions of a worker above which it is behind: some 10 MB of its memory, and of the stream.
MAX_UNWRITTEN: Final = 10_000
#: Default of the seconds for which Postgres may take nothing before a worker is behind.
WRITE_WITHIN: Final = 20.0
#: Seconds after which an unwritten transition says that Postgres is slow or away.
LATE: Final = 0.5
#: Seconds between tries while Postgres does not answer.
RETRY_AFTER: Final = (0.1, 0.2, 0.5, 1.0, 2.0)

_TAKEABLE: Final = text("""
SELECT EXISTS (SELECT 1 FROM jobs
  JOIN unnest(CAST(:jobs AS text[]), CAST(:incarnations AS text[])) AS x (job, writer) ON id = job
  WHERE finished_at IS NULL AND NOT (state IN ('admitted', 'running') AND incarnation = writer))
""")


class Recorder(BatchThread[Transition]):
    """Queue of transitions that its thread writes to Postgres.

    `on_applied` is called with the rows that changed, `on_level` when the recorder is behind no more. `write_within`:
    seconds for which Postgres may take nothing before the recorder is behind.
    """

    most = MAX_TRANSITIONS
    collects = BATCH_WITHIN

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        on_applied: Callable[[Sequence[Applied]], None] = lambda _: None,
        on_level: Callable[[], None] = lambda: None,
        write_within: float = WRITE_WITHIN,
    ) -> None:
        super().__init__("recorder")
        self._engine = engine
        self._ledger = ledger
        self._on_applied = on_applied
        self._on_level = on_level
        self._write_within = write_within
        self._calls = StoreCalls()
        #: Times at which the pending transitions came (monotonic), and how many came at each.
        self._came: deque[tuple[float, int]] = deque()
        self._was_behind = False
        self.retry_after = RETRY_AFTER

    def add(self, items: Iterable[Transition]) -> None:
        transitions = list(items)
        if not transitions:
            # An entry without transitions would stay, and later transitions would seem as old as this entry.
            return
        with self._changed:
            self._came.append((time.monotonic(), len(transitions)))
            super().add(transitions)

    def write(self, transitions: Sequence[Transition]) -> None:
        """Write transitions in the caller's thread, which saves a hand-off to another one.

        Where earlier transitions have been unwritten for long, these are queued behind them, so that nobody waits for a
        Postgres that is away. Transitions that Postgres does not take now are queued too.
        """
        left = Left(transitions) if self._is_late(LATE) else self._work(transitions, again=True)
        self.add([*left.kept, *left.put_off])

    def call(self, action: Callable[[], object]) -> None:
        """Run an action that may wait for a store, in a thread beside the writing of outcomes."""
        self._calls.call(action)

    def is_behind(self) -> bool:
        """Return True if so much is unwritten, or for so long, that this worker should start nothing more.

        Transitions of locked rows count by their number alone: a single locked row holds nobody up.
        """
        with self._changed:
            return self._is_late(self._write_within) or len(self._pending) + len(self._put_off) > MAX_UNWRITTEN

    def _is_late(self, seconds: float) -> bool:
        """Return True if a transition has been unwritten for longer."""
        with self._changed:
            return bool(self._came) and time.monotonic() - self._came[0][0] > seconds

    def jobs(self) -> set[str]:
        """Return the jobs of all unwritten transitions."""
        return {transition.job for transition in self.unfinished()}

    def start(self) -> None:
        self._calls.start()
        super().start()

    def claim(self, transition: Transition) -> bool | None:
        """Write a claim now, in the caller's thread; see `workers.process.claim_writer`."""
        return claim_writer.write(self._engine, transition)

    def flush(self, within: float) -> bool:
        """Wait until all added transitions are written and all calls are done; return False if time ran out."""
        end = time.monotonic() + within
        called = self._calls.flush(within)
        return super().flush(max(0.0, end - time.monotonic())) and called

    def is_level(self, flush: Callable[[], bool]) -> bool:
        """Return True if all is written (`flush`), or if no other worker could take an unwritten job from Postgres.

        If Postgres decided, it would give away neither an ended job nor a job that this worker holds by its row. Raises
        the error of Postgres.
        """
        if flush():
            return True
        unwritten = {(transition.job, transition.incarnation) for transition in self.unfinished()}
        if not unwritten:
            return True
        jobs, incarnations = map(list, zip(*sorted(unwritten), strict=True))
        with self._engine.connect() as connection:
            takeable = connection.execute(_TAKEABLE, {"jobs": jobs, "incarnations": incarnations})
            return not takeable.scalar_one()

    def stop(self, within: float) -> bool:
        """Write the pending transitions, if Postgres takes them, and end. Each thread has `within` seconds.

        The rest stays in the stream: the worker that runs the duties writes it.
        """
        called = self._calls.stop(within)
        return super().stop(within) and called

    def _settled(self, batch: Sequence[Transition], left: Left[Transition], *, again: bool) -> None:
        if not (left.kept or again):
            self._forget_times(len(batch))

    def _forget_times(self, count: int) -> None:
        """Forget the times of the `count` oldest transitions, which are written. The caller has the lock."""
        while count and self._came:
            came, size = self._came.popleft()
            if size > count:
                self._came.appendleft((came, size - count))
            count -= min(size, count)

    def _after_batch(self) -> None:
        """Log and count that Postgres is too far behind, or log that it is behind no more; only on a change."""
        behind = self.is_behind()
        if behind == self._was_behind:
            return
        self._was_behind = behind
        if not behind:
            logger.warning("Postgres has the outcomes of this worker: it starts jobs again")
            self._on_level()
            return
        logger.warning(
            "Postgres has not taken %d outcomes, the oldest for more than %g s: this worker starts no more jobs",
            len(self._pending) + len(self._put_off),
            self._write_within,
        )
        self._ledger.tally.add("behind")

    def _work(self, batch: Sequence[Transition], *, again: bool) -> Left[Transition]:
        """Write a batch. Transitions are kept while Postgres takes nothing, and put off if it refused them alone."""
        try:
            applied, refused = refused_transitions.write(self._engine, self._ledger.tally, batch, wait=not again)
        except SQLAlchemyError as error:
            logger.warning(
                "Postgres does not take %d outcomes, they are kept: %s", len(batch), error.__class__.__name__
            )
            return Left(batch)
        if refused and not again:
            logger.warning("the rows of %d outcomes are locked or damaged, they are kept", len(refused))
        kept = set(map(id, refused))
        self._after([transition for transition in batch if id(transition) not in kept], applied)
        return Left(put_off=refused)

    def _after(self, batch: Sequence[Transition], applied: Sequence[Applied]) -> None:
        """Take the steps that follow once Postgres has these transitions.

        The duties repair a step that fails here: entries are applied once more without effect, and scheduled rows are
        found when they are due.
        """
        try:
            self._ledger.ack_transitions(transition_log.written(batch))
            resubmit.go_on(self._engine, self._ledger, applied)
            self._on_applied(applied)
        except (PlatformError, LedgerClosed, SQLAlchemyError) as error:
            logger.info("left to the duties: %s", error)
        except Exception:
            logger.exception("a step after the write of outcomes failed; it is left to the duties")
