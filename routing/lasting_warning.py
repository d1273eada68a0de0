"""Warnings of troubles that last: logged when a trouble begins or changes, not at each try."""

from __future__ import annotations

import logging


class LastingWarning:
    """Warning of one thread about its store. Two messages in a row that are equal are logged once."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._message = ""

    def warn(self, message: str) -> None:
        if message != self._message:
            self._message = message
            self._logger.warning("%s", message)

    def over(self) -> None:
        """Note that the trouble is over: the next one is logged, though it be the same."""
        self._message = ""
