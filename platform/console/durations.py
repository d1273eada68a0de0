"""Durations as people type them: "90", "30s", "15min", "1h", "2d", "1w"."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final

import click

#: Seconds of each unit.
UNITS: Final = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
#: Longest duration: ten years, in seconds.
LONGEST: Final = 10 * 365 * 86400
#: Shortest duration, in seconds.
SHORTEST: Final = 0.001
_FORM: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII)


class Duration(click.ParamType):  # type: ignore[type-arg]
    """Type of an option that takes a duration, and gives its seconds."""

    name = "duration"
    advice = "Write a number and a unit: 30s, 15min, 1h, 2d."

    def __init__(self, shortest: float = 0.0, longest: float = LONGEST) -> None:
        self.shortest = shortest
        self.longest = longest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        seconds = self._seconds(str(value).strip())
        if not max(self.shortest, SHORTEST) <= seconds <= self.longest:
            bounds = "" if not self.shortest else f", {self.shortest:g} s to {self.longest:g} s"
            self.fail(f"{value!r} is no {self.name}{bounds}. {self.advice}", param, ctx)
        return seconds

    def _seconds(self, text: str) -> float:
        """Return the seconds that a text says; 0 for a text that says none."""
        match = _FORM.fullmatch(text.lower())
        unit = None if match is None else UNITS.get(match[2])
        return 0.0 if match is None or unit is None else float(match[1]) * unit


class Since(Duration):
    """Type of an option that takes a duration or a time in ISO 8601, and gives the seconds from then until now."""

    name = "time"
    advice = "Write 30s, 15min, 1h, 2d, or a time that is over, such as 2026-05-04T12:00."

    def _seconds(self, text: str) -> float:
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            return super()._seconds(text)
        try:
            when = when if when.tzinfo is not None else when.astimezone()
        except (ValueError, OverflowError):  # a year that the clock of the system does not have
            return 0.0
        return (datetime.now(UTC) - when).total_seconds()
