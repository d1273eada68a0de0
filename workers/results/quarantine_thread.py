"""Thread for unreadable messages: a caller that meets such a message hands it over here, and goes on.

A thread writes the messages to Postgres, so that the main loop waits for nothing. While Postgres is down they are kept
in memory, up to a bound. Messages beyond the bound are dropped and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.model.reasons import Refusal, Tally
from celery_capacity.routing.store import quarantine
from celery_capacity.routing.store.quarantine import SetAside
from celery_capacity.workers.results.batch_thread import BatchThread, Left

logger = logging.getLogger(__name__)

#: Most messages that wait for Postgres.
MAX_WAITING: Final = 1000
#: Most bytes of messages that wait for Postgres.
MAX_BYTES_WAITING: Final = 32 * 1024**2
#: Most messages written in one statement.
BATCH: Final = 100
#: Seconds between tries while Postgres does not answer.
RETRY_AFTER: Final = 1.0
#: Most bytes of a message that the log shows.
SHOWN: Final = 200


#: A message, its reason, and the job of whose message it may be a second copy; '' for none.
_Waiting = tuple[SetAside, Refusal, str]


class QuarantineThread(BatchThread[_Waiting]):
    """Queue of unreadable messages that its thread writes to Postgres.

    `set_aside` never waits for a store and may be called in any thread.
    """

    most = BATCH
    retry_after = (RETRY_AFTER,)

    def __init__(self, engine: Engine, tally: Tally, worker: str) -> None:
        super().__init__("quarantine")
        self._tally = tally
        self._engine = engine
        self._worker = worker
        self._bytes = 0
        self._dropped = 0
        self._logged = ""

    def set_aside(self, raw: bytes, queue: str, reason: Refusal, detail: str, unless: str = "") -> None:
        """Keep a message that was taken from a queue and cannot be read.

        `unless` is a job. A message is not kept where Postgres knows that job. Then it is a second copy of a message
        whose attempt ended so long ago that the ledger knows the job no more.
        """
        message = SetAside.of(raw, queue, reason, detail, self._worker)
        if not unless:
            self._report(message, reason)
        with self._changed:
            waiting = len(self._pending) + len(self._working)
            if waiting >= MAX_WAITING or self._bytes + len(message.raw) > MAX_BYTES_WAITING:
                self._dropped += 1
                return
            self._bytes += len(message.raw)
            self.add([(message, reason, unless)])

    def _work(self, batch: Sequence[_Waiting], *, again: bool) -> Left[_Waiting]:
        try:
            with self._engine.connect() as connection:
                self._write(connection, batch)
        except SQLAlchemyError as error:
            kind = type(error).__name__
            if kind != self._logged and not self._stopping:
                logger.warning("Postgres does not take messages for the quarantine, they are kept: %s", kind)
            self._logged = kind
            return Left(batch)
        self._logged = ""
        return Left()

    def _settled(self, batch: Sequence[_Waiting], left: Left[_Waiting], *, again: bool) -> None:
        if not left.kept:
            self._bytes -= sum(len(message.raw) for message, _, _ in batch)

    def _after_batch(self) -> None:
        with self._changed:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            logger.error("%d messages that cannot be read were dropped: too many wait for Postgres", dropped)

    def _give_up(self) -> None:
        logger.error("%d messages that cannot be read are lost: %s", len(self._pending), self._logged)

    def _write(self, connection: Connection, batch: Sequence[_Waiting]) -> None:
        known_jobs = quarantine.known(connection, [job for *_, job in batch if job])
        if unreadable := [message for message, _, job in batch if job not in known_jobs]:
            quarantine.write(connection, unreadable)
        # The batch is written by now: a batch that Postgres refuses comes here again.
        for message, reason, job in batch:
            if job in known_jobs:
                logger.info("job %s: a doubled message of an attempt that ended long ago is dropped", job)
            elif job:
                self._report(message, reason)

    def _report(self, message: SetAside, reason: Refusal) -> None:
        self._tally.add(reason)
        shown = message.raw[:SHOWN]
        logger.error("a message in the queue %.100s is set aside: %s: %r", message.queue, message.reason, shown)
