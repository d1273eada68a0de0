"""Tokens: which attempt of a job it is."""

from __future__ import annotations

from typing import NamedTuple


class Token(NamedTuple):
    """An attempt of a job: the epoch in which it was made, and its number. Of two tokens the larger is the newer.

    In messages, in the ledger and in errors a token is the text `<epoch>.<attempt>`.
    """

    epoch: int
    attempt: int

    @classmethod
    def parse(cls, text: str) -> Token:
        """Return the token of a text. Raises `ValueError` for any other text."""
        epoch, _, attempt = text.partition(".")
        if not (epoch.isascii() and epoch.isdigit() and attempt.isascii() and attempt.isdigit()):
            raise ValueError(f"{text!r} is no token: <epoch>.<attempt>, two whole numbers, was expected")
        return cls(int(epoch), int(attempt))

    def __str__(self) -> str:
        return f"{self.epoch}.{self.attempt}"
