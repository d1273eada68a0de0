"""Keys as a person types them, read at once and without an echo."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any


class Keys(AbstractContextManager["Keys"]):
    """The keys of standard input. Where that is no terminal, none comes. Ctrl-C stays Ctrl-C."""

    def __init__(self) -> None:
        has_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
        self._descriptor = sys.stdin.fileno() if has_terminal else None
        self._before: list[Any] | None = None

    def __enter__(self) -> Keys:
        if self._descriptor is not None:
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None and self._before is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def wait(self, seconds: float) -> str | None:
        """Return the next key, at most `seconds` later; None for none."""
        if self._descriptor is None:
            time.sleep(seconds)
            return None
        ready, _, _ = select.select([self._descriptor], [], [], seconds)
        if not ready:
            return None
        typed = os.read(self._descriptor, 1)
        if not typed:  # the end of the input: no key comes any more
            self._descriptor = None
        return typed.decode("ascii", "replace")
