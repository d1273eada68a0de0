"""Warnings of troubles that last: logged when a trouble begins or changes, not at each try."""

from __future__ import annotations

import logging


class LastingWarning:
    """Warning of one thread about its store. Two messages in a row that are equal are logged once."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._message = ""

    def warn(self, message: str, trace: BaseException | None = None) -> None:
        """Log a message that is new. `trace`: the error whose traceback follows it."""
        if message != self._message:
            self._message = message
            self._logger.warning("%s", message, exc_info=trace)

    def over(self) -> bool:
        """Return True if there was a trouble, which is over now: the next one is logged, though it be the same."""
        lasted, self._message = bool(self._message), ""
        return lasted
