"""Claimed jobs on their way to a request of Celery's: handed from the ledger's thread to the main loop.

Where the pool is of greenlets the main loop has no events, and a greenlet of its own does this
(`workers.execute.gevent_pool`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from celery.worker import state as worker_state

from celery_capacity.routing.model.envelope import tag_at_end
from celery_capacity.routing.model.message import parse_tag
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.wake import Wake
from celery_capacity.workers.broker import transport
from celery_capacity.workers.execute.gevent_pool import Starter
from celery_capacity.workers.execute.returned import ReturnedMessages
from celery_capacity.workers.results.events import Announcer
from celery_capacity.workers.settle.settle_loop import SettleLoop

logger = logging.getLogger(__name__)


class StartQueue:
    """Queue of claimed messages that the main loop is to start.

    `loop` wakes the main loop. `refusing` ends the job of a message that never becomes a request. `hand_back` is called
    with the job and the token of a claimed message that is not started. `begin` is called before the pool gets a job,
    and returns False where the job went back meanwhile.
    """

    def __init__(
        self,
        loop: Wake,
        announcer: Announcer,
        returned: ReturnedMessages,
        hand_back: Callable[[str, Token], None],
        begin: Callable[[str, Token], bool],
        refusing: Callable[[Any, str], AbstractContextManager[None]],
    ) -> None:
        self._loop = loop
        self._starter: Starter | None = None
        self._announcer = announcer
        #: Content types that bodies may have.
        self.accept: Any = None
        self._refusing = refusing
        self._hand_back = hand_back
        self._begin = begin
        self._returned = returned
        #: Celery's own handler of a message, set by the consumer.
        self.handle: Callable[[Any], None] | None = None
        self._claimed: deque[Any] = deque()
        #: True while the main loop runs: a message that is handed to it starts at once.
        self.attached = False
        self._stopped = False
        #: Thread of the main loop, and the steps at the end of its turns; see `workers.settle.settle_loop`.
        self._main = 0
        self.settles: SettleLoop | None = None
        #: True for a pool whose bodies run in the main loop, or make it wait.
        self.runs_bodies = False
        #: `_busy`: the main loop is starting messages. `_turned`: it took the turn that it was last asked for.
        self._busy, self._turned = False, True

    def start_greenlets(self) -> None:
        """Start messages in a greenlet: the main loop of a pool of greenlets has no hub."""
        self._starter = Starter(self._loop.fileno(), self._start_all)

    def take(self, message: Any) -> None:
        """Hand a claimed message to the main loop, or the text of one that came in a reply. In any thread.

        The main loop itself starts it at the end of its turn.
        """
        self._claimed.append(message)
        if self._stopped:
            self._hand_back_all()
        if threading.get_ident() != self._main:
            self._loop.set()

    def ask_turn(self) -> None:
        """Have the main loop take a turn soon, in any thread."""
        self._turned = False
        self._loop.set()

    def took_turn(self) -> bool:
        """Return True if the main loop took a turn since it was asked for one, or has none to take.

        It has none while it waits for its broker, when it has ended, and while it runs a body.
        """
        waits = not self.attached or self._stopped or (self.runs_bodies and self._busy)
        return self._turned or waits

    def attach(self, hub: Any) -> None:
        """Note that the main loop runs. `hub`: Celery's hub with which it waits, None beside greenlets."""
        if self._starter is not None:
            self._starter.begin()
        else:
            hub.add_reader(self._loop.fileno(), self._start_all)
            if self.settles is not None and not self.runs_bodies:
                self._main = threading.get_ident()
                self.settles.attach(hub, self._start_ready, self._loop.set)
        self.attached = True
        self._loop.set()

    def detach(self) -> None:
        """Note that the main loop waits for its broker: a message that is handed to it would not start."""
        self.attached = False
        if self.settles is not None:
            self.settles.detach()

    def stop(self) -> None:
        """Hand back the claimed messages that have not started, and those that still come. The main loop has ended."""
        self._stopped = True
        if self.settles is not None:
            self.settles.detach()
        if self._starter is not None:
            self._starter.end()
        self._hand_back_all()

    def _start_all(self) -> None:
        """Take the turn that was asked for, in the main loop."""
        self._loop.clear()
        self._turned = True
        if self.attached:
            self._start_ready()
            if self.settles is not None:
                self.settles.send()

    def _start_ready(self) -> None:
        """Make requests of the claimed messages, in the main loop."""
        if not self.attached:
            return
        self._busy = True
        try:
            self._announcer.say()
            self._start_claimed()
        finally:
            self._busy = False

    def _start_claimed(self) -> None:
        while self._claimed:
            message = self._claimed.popleft()
            assert self.handle is not None, "the consumer sets it before its loop runs"
            if isinstance(message, str):
                message = transport.replied_message(message, self.accept)
            try:
                if message.spoiled is not None:
                    raise message.spoiled
                if self._returned.takes(message):
                    continue
                if message.revoked:
                    worker_state.revoked.add(message.headers.get("id"))
                tag = parse_tag(message.delivery_tag)
                if tag is not None and not self._begin(tag.job, tag.token):
                    continue
                self._announcer.admitted(message)
                self.handle(message)
            except Exception as error:
                # Any error here concerns this one message.
                with self._refusing(message, f"cannot be started: {error!r}"):
                    logger.exception("the message of %s cannot be started", message.delivery_tag)
            except BaseException:
                if self._starter is not None:
                    # The starter's greenlet was ended while it waited for a place in the pool.
                    self._claimed.appendleft(message)
                raise

    def _hand_back_all(self) -> None:
        while self._claimed:
            message = self._claimed.popleft()
            tag = parse_tag(tag_at_end(message.encode()) if isinstance(message, str) else message.delivery_tag)
            if tag is not None:
                self._hand_back(tag.job, tag.token)
