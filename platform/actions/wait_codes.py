"""Exit codes and the time-out of a wait, apart from the wait itself, so that a help text imports no store."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from celery_capacity.workers.process.exit_codes import Exit

#: Meanings of the exit codes of a wait.
CODES: Final = {
    Exit.FAILED: "a job failed or was lost; or there is no such job",
    Exit.CANCELLED: "a job was cancelled or expired, and none failed",
    Exit.TIMED_OUT: "a job had not ended after --timeout",
}

F = TypeVar("F", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """Type of an option that takes a finite number of seconds."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a finite number. Without the option the wait has no end.", param, ctx)
        return seconds


def timeout_option(text: str) -> Callable[[F], F]:
    """Return the option `--timeout SECONDS` of a command that waits. `text`: its help."""
    return click.option("--timeout", metavar="SECONDS", type=Seconds(), help=text)
