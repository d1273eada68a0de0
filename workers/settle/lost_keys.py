"""Ends of jobs whose keys the ledger lost, though this worker holds them.

Keys go missing where Redis evicts them, or somebody deletes them. The ledger also knows nothing of a job that ended
more than a tombstone ago. Postgres tells the two apart: where the job's row says that it runs here, in this attempt,
the ledger gets it back, and takes its end as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from celery_capacity.routing import os_threads
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.process.claims import running
from celery_capacity.workers.process.holdings import Holding, Holdings
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.settle.postgres_ends import End

logger = logging.getLogger(__name__)

#: Seconds between two questions to a Postgres that does not answer.
ASK_AFTER: Final = 0.25


class Keyless:
    """`claim` writes that an attempt runs, and returns what `workers.process.claims.write` does; `later` runs what may
    wait for a store in a thread of its own; there `say_again` gets the end once more, and `wake` is called."""

    def __init__(
        self,
        ledger: Ledger,
        identity: Identity,
        holdings: Holdings,
        claim: Callable[[Transition], bool | None],
        later: Callable[[Callable[[], None]], None],
        say_again: Callable[[End], None],
        wake: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._identity = identity
        self._holdings = holdings
        self._claim = claim
        self._later = later
        self._say_again = say_again
        self._wake = wake
        self._pause = os_threads.Event()

    def takes(self, end: End) -> bool:
        """Whether an end that the ledger calls unknown is looked into, and said again afterwards: once."""
        holding = self._holdings.find(end.ended.job, end.ended.token)
        if holding is None or end.restored:
            return False
        self._later(partial(self._restore, end, holding))
        return True

    def _restore(self, end: End, holding: Holding) -> None:
        self._say_again(self._restored(end, holding))
        self._wake()

    def _restored(self, end: End, holding: Holding) -> End:
        has_claim = self._claim(running(self._identity, holding))
        if has_claim is None:
            self._pause.wait(ASK_AFTER)
            return end
        try:
            if has_claim:
                self._ledger.adopt(self._identity.name, self._identity.incarnation, [holding.as_adopted()])
                logger.warning("job %s: the ledger had lost its key, and has it again", holding.job)
            else:
                self._ledger.count("stale.release")
        except (StoreUnavailable, LedgerClosed) as error:
            logger.info("job %s: its key is not there, and the ledger does not answer: %s", holding.job, error)
            return end
        return replace(end, restored=True)
