"""Ends of jobs whose keys the ledger lost, though this worker holds them.

Keys go missing where Redis evicts them, or somebody deletes them. The ledger also knows nothing of a job that ended
more than a tombstone ago. Postgres tells the two apart. Where the job's row says that it runs here, in this attempt,
the ledger gets the job back, and takes its end like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from celery_capacity.routing import os_threads
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.claim_writer import running
from celery_capacity.workers.process.holdings import Holding
from celery_capacity.workers.settle.postgres_ends import End

logger = logging.getLogger(__name__)

#: Seconds between two questions to a Postgres that does not answer.
ASK_AFTER: Final = 0.25


class LostKeys:
    """Ends whose keys the ledger lost, and which are repeated once Postgres has judged them.

    `repeat` gets each end once more, in a thread of the recorder's that may wait for a store. `on_repeated` is called
    after that.
    """

    def __init__(
        self,
        context: WorkerContext,
        repeat: Callable[[End], None],
        on_repeated: Callable[[], None],
    ) -> None:
        self._ledger = context.ledger
        self._identity = context.identity
        self._holdings = context.holdings
        self._recorder = context.recorder
        self._repeat = repeat
        self._on_repeated = on_repeated
        self._pause = os_threads.Event()
        #: Attempts (job, token) whose ends are under examination.
        self._under_way: set[tuple[str, Token]] = set()

    @property
    def busy(self) -> bool:
        """Return True while an end is still to be repeated."""
        return bool(self._under_way)

    def takes(self, end: End) -> bool:
        """Return True if an end that the ledger calls unknown is examined here, and then repeated.

        It is repeated until Postgres says that the job is no longer this worker's.
        """
        holding = self._holdings.find(end.ended.job, end.ended.token)
        if holding is None or end.refused:
            return False
        self._under_way.add(holding.key)
        self._recorder.call(partial(self._restore, end, holding))
        return True

    def _restore(self, end: End, holding: Holding) -> None:
        try:
            end = self._judged(end, holding)
        except Exception as error:
            # No error may stop the repeat: an end that nobody repeats keeps its allocation for ever.
            if not isinstance(error, (StoreUnavailable, LedgerClosed)):
                logger.exception("job %s: the ledger lost its key; the next try restores it", holding.job)
            self._pause.wait(ASK_AFTER)
        # The order matters: a leaving worker looks first if an end is under way, then at the ends, and is woken last.
        self._repeat(end)
        self._under_way.discard(holding.key)
        self._on_repeated()

    def _judged(self, end: End, holding: Holding) -> End:
        has_claim = self._recorder.claim(running(self._identity, holding))
        if has_claim is None:
            # A leaving worker asks too, as long as there is time: a later attempt may have ended the job, and this end
            # would replace its result. A job whose end is not repeated by then is taken back.
            self._pause.wait(ASK_AFTER)
            return end
        if has_claim is False:
            self._ledger.tally.add(Refusal.STALE_RELEASE)
            return replace(end, refused=True)
        if not self._ledger.adopt(self._identity.name, self._identity.incarnation, [holding.as_adopted()]):
            logger.warning("job %s: the ledger had lost its key, and has it again", holding.job)
        return end
