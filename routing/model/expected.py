"""Expected run times of jobs, and the classes by which jobs with similar ones wait together.

A time is a whole number of milliseconds, and 0 is an unknown time. The ledger files a job under the class of its time.
Jobs of one request and class stand in one queue, so few classes keep the queues few. A class is never shorter than the
time, and at most 19 % longer: four classes double a time.

A hard time limit *bounds* a job: it ends by then. A job without one is bounded by its expected time.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from datetime import timedelta
from decimal import Decimal
from numbers import Real
from typing import Final, NamedTuple, NoReturn

from celery_capacity.routing.errors import InvalidRequest, show

#: Name of the option, and of a task's attribute.
EXPECTED: Final = "expected"
#: Keys in the header of a message: the time that somebody declared, and the task's own [hard, soft] time limit, where
#: the message has none. Milliseconds.
EXPECTED_MS: Final = "expected_ms"
LIMITS: Final = "limits_ms"
#: Milliseconds of the shortest class: below, a scheduler's own delays decide.
SHORTEST_MS: Final = 100
#: Milliseconds of the longest class, and the longest time that a person may give: ten years.
LONGEST_MS: Final = 10 * 365 * 86_400_000
#: Classes in which a time doubles.
CLASSES_IN_DOUBLE: Final = 4
#: Milliseconds of all classes, the shortest first.
CLASSES: Final = (
    *(
        round(SHORTEST_MS * 2 ** (number / CLASSES_IN_DOUBLE))
        for number in range(math.ceil(CLASSES_IN_DOUBLE * math.log2(LONGEST_MS / SHORTEST_MS)))
    ),
    LONGEST_MS,
)
#: Milliseconds of each unit that people write.
UNITS: Final = {
    "ms": 1,
    "": 1000,
    "s": 1000,
    "m": 60_000,
    "min": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 604_800_000,
}
_PART: Final = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)\s*", re.ASCII)


class RunTime(NamedTuple):
    """Run time of a job in milliseconds, 0 where it is unknown. `bound`: the time by which it has ended."""

    expected: int = 0
    bound: int = 0


class Limits(NamedTuple):
    """Celery's time limits of a job in milliseconds, 0 for none."""

    hard: int = 0
    soft: int = 0


#: Run time of a job of which nothing is known.
UNKNOWN: Final = RunTime()
NO_LIMITS: Final = Limits()


def expected_class(ms: int) -> int:
    """Return the class of a time: the shortest one that is not shorter. 0, an unknown time, has the class 0."""
    return CLASSES[min(bisect_left(CLASSES, ms), len(CLASSES) - 1)] if ms > 0 else 0


def class_number(ms: int) -> int:
    """Return the place of a time's class among `CLASSES`, -1 for an unknown time."""
    return bisect_left(CLASSES, expected_class(ms)) if ms > 0 else -1


def within_limits(expected: int, limits: Limits) -> RunTime:
    """Return the run time of a job that is expected to run so long, under Celery's time limits.

    No job is expected to run longer than a limit. A job of an unknown time is expected to run as long as its limit.
    """
    shortest = min(filter(None, limits), default=0)
    expected = min(expected, shortest) if expected and shortest else expected or shortest
    return RunTime(expected, limits.hard or expected)


def parse_duration(value: object, what: str = EXPECTED) -> int:
    """Return the milliseconds of a duration as people write it: seconds, a timedelta, or text such as "1h30m".

    Raises `InvalidRequest` where it is no duration, or not from 1 ms to ten years.
    """
    if isinstance(value, timedelta):
        return _in_range(Decimal(value / timedelta(milliseconds=1)), value, what)
    if isinstance(value, str):
        return _in_range(_of_text(value, what), value, what)
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)) or not _is_finite(value):
        _refuse(value, what)
    return _in_range(Decimal(str(value)) * 1000, value, what)


def _is_finite(value: Real | Decimal) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _of_text(text: str, what: str) -> Decimal:
    total, at, rest = Decimal(0), 0, text.strip().lower()
    while match := _PART.match(rest, at):
        unit = UNITS.get(match[2])
        if unit is None or (match[2] == "" and match.end() < len(rest)):
            break
        total, at = total + Decimal(match[1]) * unit, match.end()
    if not rest or at < len(rest):
        _refuse(text, what)
    return total


def _in_range(ms: Decimal, value: object, what: str) -> int:
    if not 1 <= ms <= LONGEST_MS:
        _refuse(value, what)
    return math.ceil(ms)


def _refuse(value: object, what: str) -> NoReturn:
    raise InvalidRequest(
        f"{what}={show(value)} is not valid",
        value=value,
        advice="It must be a duration up to ten years: seconds such as 90, or text such as '30s', '10m' or '1h30m'.",
    )


def duration_text(ms: int) -> str:
    """Return a duration for people, in its two largest units: "10 min", "1 h 30 min", "1.5 s"."""
    if ms < 60_000:
        return f"{ms / 1000:.10g} s"
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)):
        number, ms = divmod(ms, size)
        if number:
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2])
