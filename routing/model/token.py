"""The token of an attempt, in one form everywhere.

Messages, keys, replies and rows have a token as text or as two numbers. It is parsed where it comes in, and printed
where it goes out. In between every carrier holds a `Token`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple


class Token(NamedTuple):
    """An attempt of a job: the epoch in which it was made, and its number. Of two tokens the larger is the newer.

    In messages, in the ledger and in errors a token is the text `<epoch>.<attempt>`.
    """

    epoch: int
    attempt: int

    @classmethod
    @lru_cache(maxsize=1024)
    def parse(cls, text: str) -> Token:
        """Return the token of a text. Raises `ValueError` for any other text.

        The newest tokens are remembered: nearly all jobs of an epoch have the same few.
        """
        epoch, _, attempt = text.partition(".")
        if not (epoch.isascii() and epoch.isdigit() and attempt.isascii() and attempt.isdigit()):
            raise ValueError(f"{text!r} is no token: <epoch>.<attempt>, two whole numbers, was expected")
        return cls(int(epoch), int(attempt))

    def next(self) -> Token:
        """Return the token of the next attempt in the same epoch."""
        return Token(self.epoch, self.attempt + 1)

    def columns(self) -> dict[str, int]:
        """Return the values of a row's columns, by the names that the statements have for them."""
        return {"epoch": self.epoch, "attempt": self.attempt}

    def __str__(self) -> str:
        return f"{self.epoch}.{self.attempt}"


#: Token of a job before its first attempt, and of a speaker for no attempt: older than every other token.
NO_ATTEMPT: Final = Token(0, 0)
