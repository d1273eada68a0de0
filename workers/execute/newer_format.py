"""Messages of a format that this release does not know: their jobs go back, for a worker of a newer release.

A job is handed back at once when it comes the first time. A job that comes again, because no newer worker had room, is
held for START before it goes back. So it does not go to and fro as fast as the ledger answers.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model import format_versions
from celery_capacity.routing.model.message import HEADER, parse_tag
from celery_capacity.routing.model.token import Token

logger = logging.getLogger(__name__)

#: Jobs that are remembered as handed back before.
MAX_REMEMBERED: Final = 1000


class NewerFormats:
    """Handling of messages of newer formats, for the main loop.

    `put_off` and `hand_back` get a job and its token, in any thread: its body has not begun, and the job goes back.
    `count` counts a message. `hold`: seconds for which a repeated job is held.
    """

    def __init__(
        self,
        put_off: Callable[[str, Token], None],
        hand_back: Callable[[str, Token], None],
        count: Callable[[], None],
        hold: float,
    ) -> None:
        self._put_off = put_off
        self._hand_back = hand_back
        self._count = count
        self._hold = hold
        self._returned: OrderedDict[str, None] = OrderedDict()
        self._told: set[str] = set()

    def returns(self, message: Any) -> bool:
        """Return True if the message is of a format that this release does not know. Then its job goes back."""
        carried = message.headers.get(HEADER)
        try:
            format_versions.check_message(carried if isinstance(carried, Mapping) else {})
        except InvalidRequest as error:
            self._return(message, str(error))
            return True
        return False

    def _return(self, message: Any, reason: str) -> None:
        tag = parse_tag(message.delivery_tag)
        assert tag is not None, "it was claimed by its tag"
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("job %s is handed back: %s", tag.job, reason)
        self._count()
        self._put_off(tag.job, tag.token)
        if tag.job not in self._returned:
            self._returned[tag.job] = None
            while len(self._returned) > MAX_REMEMBERED:
                self._returned.popitem(last=False)
            self._hand_back(tag.job, tag.token)
            return
        timer = threading.Timer(self._hold, self._hand_back, (tag.job, tag.token))
        timer.daemon = True
        timer.start()
