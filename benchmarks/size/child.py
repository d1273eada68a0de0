"""A separate process that gets its commands over a pipe."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

#: Seconds for an answer: the longest takes a minute.
PATIENCE: Final = 300.0


class Child:
    """A fresh interpreter that runs `main(pipe, *arguments)`. `ask` sends it a word and returns the answer."""

    def __init__(self, main: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=main, args=(other, *arguments), daemon=True)
        self._process.start()
        other.close()

    def ask(self, word: str) -> Any:
        self._pipe.send(word)
        return self.answer()

    def answer(self) -> Any:
        """Return the child's next answer. Raise RuntimeError if the child has died or is silent for too long."""
        if not self._pipe.poll(PATIENCE):
            raise RuntimeError(f"process {self._process.pid} does not answer")
        try:
            return self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"process {self._process.pid} has died") from error

    def end(self) -> None:
        self._process.kill()
        self._process.join()
