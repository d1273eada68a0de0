"""Entry of a worker: it registers with the store that decides, and waits for a store that is down."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from redis.exceptions import RedisError

from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.dispatch.published_declarations import Declarations
from celery_capacity.workers.membership.authority_check import Confirmation
from celery_capacity.workers.membership.cold_ledger import open_ledger
from celery_capacity.workers.membership.failover import Reachability
from celery_capacity.workers.membership.preflight import check_stores
from celery_capacity.workers.membership.registration import Membership
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.process.waiting_for_stores import may_pass, when_stores_answer

logger = logging.getLogger(__name__)

#: Seconds between two looks at a ledger that another process is opening.
OPEN_AGAIN_AFTER: Final = 0.05


class Joining:
    """Entry of an incarnation of a worker. `challenge` asks another incarnation of the name to show itself."""

    def __init__(
        self,
        stores: Stores,
        membership: Membership,
        confirmation: Confirmation,
        reachability: Reachability,
        challenge: Callable[[], None],
    ) -> None:
        self._stores = stores
        self._membership = membership
        self._confirmation = confirmation
        self._reachability = reachability
        self._challenge = challenge
        #: `met`: this incarnation has met the other workers. `begun`: it has begun to register.
        self.met = self.begun = False

    def meet(self, wait: Callable[[float], object]) -> None:
        """Check the stores, and make sure of the name, as soon as the stores allow it.

        `wait` waits for so many seconds, and raises where the process is to end. Raises `NameTaken`, and any error that
        no waiting changes.
        """
        when_stores_answer(self._meet, wait)
        self.met = True

    def enter(self, capacity: Capacity, declared: Declarations, wait: Callable[[float], object]) -> int:
        """Register with the store that decides, as soon as it answers; return how many waiting jobs were admitted."""
        self.begun = True
        return when_stores_answer(lambda: self._enter(capacity, declared, wait), wait)

    def _meet(self) -> None:
        try:
            check_stores(self._stores.engine, self._stores.redis, self._stores.settings)
            # Raises where the books are those of another database, or of a newer format.
            self._stores.ledger.own_database()
            self._stores.ledger.opened()
            self._membership.name_claim.take(self._challenge)
        except (StoreUnavailable, RedisError) as error:
            if not may_pass(error):
                raise
            # Where it was Postgres that did not answer, this call fails too.
            with translated():
                self._membership.name_claim.take(None)

    def _enter(self, capacity: Capacity, declared: Declarations, wait: Callable[[float], object]) -> int:
        # Use a handle apart, since the handle of an opener stays in the epoch that it opens.
        apart = self._stores.apart()
        try:
            return self._enter_with(apart, capacity, declared, wait)
        finally:
            apart.redis.close()

    def _enter_with(
        self, apart: Stores, capacity: Capacity, declared: Declarations, wait: Callable[[float], object]
    ) -> int:
        while True:
            self._confirmation.ask()
            if self._confirmation.authority == Store.POSTGRES:
                self._membership.register_in_postgres(capacity, declared, ledger_lost=self._reachability.lost)
                return 0
            try:
                open_ledger(apart)
                return self._membership.register(capacity, declared, self._challenge)
            except LedgerClosed:
                # Another process is opening the epoch, or the epoch changed just now.
                wait(OPEN_AGAIN_AFTER)
            except (StoreUnavailable, RedisError) as error:
                if not may_pass(error):
                    raise
                logger.warning("the ledger does not answer, this worker starts without it: %s", error)
                self._reachability.note(lost=True)
                self._membership.register_in_postgres(capacity, declared, ledger_lost=True)
                return 0
