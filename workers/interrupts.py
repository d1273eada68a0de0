"""Ctrl-C while the program of a command imports what it needs: the process ends at once, without a traceback.

Nothing was started by then, so nothing is to be ended. Python's own handler would raise an error in the middle of an
import, and show where. The script `capacity` imports this module before all others, so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

#: Commands that start processes, and say so when Ctrl-C ends them.
STARTING = ("demo", "up")

#: Options of `celery` and of `capacity` that are followed by a value.
WITH_VALUE = ("-A", "--app", "-b", "--broker", "--result-backend", "--loader", "--config", "--workdir")


def command_of(words: list[str]) -> str | None:
    """Return the command among the words after `celery` or `capacity`, or None."""
    value = False
    for word in words:
        if value:
            value = False
        elif word in WITH_VALUE:
            value = True
        elif not word.startswith("-"):
            return word
    return None


def end_at_once(command: str | None) -> None:
    """Have Ctrl-C end this process, as it does later while the command works. Do nothing where it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted if command in STARTING else signal.SIG_DFL)


def as_python_does() -> None:
    """Give Ctrl-C back to Python's own handler, for a program that expects it."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, _interrupted):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(_signum: int, _frame: object) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"Interrupted.\n")
    os._exit(128 + signal.SIGINT)
