"""Messages that this worker cannot run: their jobs go back, for a worker that can.

A message may be of a newer format, or of a task that this worker has not registered. The ledger admits a job only to a
worker that knows its task, so the latter is rare: a job that an older release filed, or a task that was taken away.

A job is handed back at once when it comes the first time. A job that comes again, because no other worker had room, is
held for START before it goes back. Else it would go back and forth as fast as the ledger answers.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from celery_capacity.routing import format_versions
from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model.message import HEADER, parse_tag
from celery_capacity.routing.model.reasons import Refusal, Tally
from celery_capacity.routing.model.request import KNOWN_EVERYWHERE
from celery_capacity.routing.model.token import Token

logger = logging.getLogger(__name__)

#: Jobs that are remembered as handed back before.
MAX_REMEMBERED: Final = 1000


class ReturnedMessages:
    """Handling of messages that this worker cannot run, for the main loop.

    `knows` tells whether a task is registered. `put_off` gets a job and its token, `hand_back` the reason too, in any
    thread: the body has not begun, and the job goes back. `hold`: seconds for which a repeated job is held.
    """

    def __init__(
        self,
        tally: Tally,
        knows: Callable[[str], bool],
        put_off: Callable[[str, Token], None],
        hand_back: Callable[[str, Token, str], None],
        hold: float,
    ) -> None:
        self._tally = tally
        self._knows = knows
        self._put_off = put_off
        self._hand_back = hand_back
        self._hold = hold
        self._returned: OrderedDict[str, None] = OrderedDict()
        self._logged: set[str] = set()

    def takes(self, message: Any) -> bool:
        """Return True if this worker cannot run the message. Then its job goes back."""
        carried = message.headers.get(HEADER)
        try:
            format_versions.check_message(carried if isinstance(carried, dict) else {})
        except InvalidRequest as error:
            self._tally.add(Refusal.FORMAT)
            self._return(message, str(error))
            return True
        task = message.headers.get("task")
        # A task that every worker should have is in no catalogue. If its job went back, it would come again for ever.
        if isinstance(task, str) and not task.startswith(KNOWN_EVERYWHERE) and not self._knows(task):
            self._tally.add(Refusal.TASK)
            self._return(message, f"this worker does not know the task {show(task)}")
            return True
        return False

    def _return(self, message: Any, reason: str) -> None:
        tag = parse_tag(message.delivery_tag)
        assert tag is not None, "it was claimed by its tag"
        if reason not in self._logged and len(self._logged) < MAX_REMEMBERED:
            self._logged.add(reason)
            logger.warning("job %s is handed back: %s", tag.job, reason)
        self._put_off(tag.job, tag.token)
        if tag.job not in self._returned:
            self._returned[tag.job] = None
            while len(self._returned) > MAX_REMEMBERED:
                self._returned.popitem(last=False)
            self._hand_back(tag.job, tag.token, reason)
            return
        timer = threading.Timer(self._hold, self._hand_back, (tag.job, tag.token, reason))
        timer.daemon = True
        timer.start()
