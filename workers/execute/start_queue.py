"""What was claimed, until it is a request of Celery's: handed from the ledger's thread to the main loop.

Where the pool is of greenlets the main loop has no events, and a greenlet of its own does this
(`workers.execute.gevent_pool`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from celery.worker import state as worker_state

from celery_capacity.routing.model.envelope import tag_at_end
from celery_capacity.routing.model.message import parse_tag
from celery_capacity.routing.wake import Wake
from celery_capacity.workers.broker import transport
from celery_capacity.workers.execute.gevent_pool import Starter
from celery_capacity.workers.execute.newer_format import NewerFormats
from celery_capacity.workers.results.events import Announcer

logger = logging.getLogger(__name__)


class Starting:
    """`loop` wakes the main loop. `refusing` ends the job of a message that never becomes a request. `hand_back` is
    called with the job and the token of what was claimed and is not started; `begin` before the pool gets it: False
    where it went back meanwhile."""

    def __init__(
        self,
        loop: Wake,
        green: bool,
        announcer: Announcer,
        accept: Any,
        refusing: Callable[[Any, str], AbstractContextManager[None]],
        hand_back: Callable[[str, str], None],
        begin: Callable[[str, str], bool],
        newer: NewerFormats,
    ) -> None:
        self._loop = loop
        self._starter = Starter(loop.fileno(), self._start_all) if green else None
        self._announcer = announcer
        self._accept = accept
        self._refusing = refusing
        self._hand_back = hand_back
        self._begin = begin
        self._newer = newer
        #: Celery's own handler of a message, set by the consumer.
        self.handle: Callable[[Any], None] | None = None
        self._claimed: deque[Any] = deque()
        #: Whether the main loop runs: what is handed to it starts at once.
        self.attached = False
        self._stopped = False

    def take(self, message: Any) -> None:
        """In the ledger thread: hand a claimed message to the main loop, or the text of one that came in a reply."""
        self._claimed.append(message)
        if self._stopped:
            self._hand_back_all()
        self._loop.set()

    def attach(self, hub: Any) -> None:
        """The main loop runs. `hub`: what it waits with, None beside greenlets."""
        if self._starter is not None:
            self._starter.begin()
        else:
            hub.add_reader(self._loop.fileno(), self._start_all)
        self.attached = True
        self._loop.set()

    def detach(self) -> None:
        """The main loop waits for its broker: what is handed to it would not start."""
        self.attached = False

    def stop(self) -> None:
        """In the main loop, which will not run again: what was claimed and not started, now or later, goes back."""
        self._stopped = True
        if self._starter is not None:
            self._starter.end()
        self._hand_back_all()

    def _start_all(self) -> None:
        """In the main loop: what was claimed becomes requests."""
        self._loop.clear()
        if not self.attached:
            return
        self._announcer.say()
        while self._claimed:
            message = self._claimed.popleft()
            assert self.handle is not None, "the consumer sets it before its loop runs"
            if isinstance(message, str):
                message = transport.replied_message(message, self._accept)
            try:
                if message.spoiled is not None:
                    raise message.spoiled
                if self._newer.returns(message):
                    continue
                if message.revoked:
                    worker_state.revoked.add(message.headers.get("id"))
                tag = parse_tag(message.delivery_tag)
                if tag is not None and not self._begin(tag.job, tag.token):
                    continue
                self._announcer.admitted(message)
                self.handle(message)
            except Exception as error:
                # Whatever it is, it concerns this one message.
                with self._refusing(message, f"cannot be started: {error!r}"):
                    logger.exception("the message of %s cannot be started", message.delivery_tag)
            except BaseException:
                if self._starter is not None:
                    # Its greenlet was ended while it waited for a place in the pool.
                    self._claimed.appendleft(message)
                raise

    def _hand_back_all(self) -> None:
        while self._claimed:
            message = self._claimed.popleft()
            tag = parse_tag(tag_at_end(message.encode()) if isinstance(message, str) else message.delivery_tag)
            if tag is not None:
                self._hand_back(tag.job, tag.token)
