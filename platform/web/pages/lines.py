"""Lines of the last hour, drawn by the server: no library, and no script of the page.

A chart is 600 by 100 units. It is stretched to the width of its place, and its strokes keep their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

WIDTH: Final = 600.0
HEIGHT: Final = 100.0

#: Titles of the charts, and their lines: the member of a minute, its name, and its class in the style sheet.
CHARTS: Final = (
    ("Allocated CPUs", (("allocated_cpus", "allocated", "l0"),)),
    ("Waiting jobs", (("waiting", "waiting", "l1"),)),
    ("Jobs a second", (("started_per_second", "started", "l0"), ("ended_per_second", "ended", "l1"))),
    ("Wait in seconds", (("wait_p50_seconds", "p50", "l0"), ("wait_p95_seconds", "p95", "l1"))),
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart. `path`: of SVG; `last`: its newest value in words, "–" for none."""

    name: str
    colour: str
    path: str
    last: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one scale, which begins at 0. `top`: its end in words."""

    title: str
    lines: Sequence[Line]
    top: str


def charts(hour: Mapping[str, Any]) -> list[Chart]:
    """Return the charts of the last hour. CPUs are drawn over all that the cluster has now."""
    minutes = hour["minutes"]
    drawn = []
    for title, lines in CHARTS:
        values = [value for member, _, _ in lines for minute in minutes if (value := minute[member]) is not None]
        least = hour["total_cpus"] if title == CHARTS[0][0] else 0
        top = max([least, *values]) or 1
        drawn.append(Chart(title, [_line(minutes, top, *line) for line in lines], words(top)))
    return drawn


def words(value: float | None) -> str:
    """Return a value with three digits at most: "1,234", "12.3", "0.05"."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def trend(values: Sequence[float]) -> tuple[str, str]:
    """Return the path of a small line over the scale from 0, and the change from its first third to its last.

    The change is in words, such as "+20 %"; both are "" where there are too few values.
    """
    third = len(values) // 3
    if not third:
        return "", ""
    top, step = max(values) or 1, WIDTH / (len(values) - 1)
    points = [f"{number * step:.0f} {HEIGHT - HEIGHT * value / top:.0f}" for number, value in enumerate(values)]
    before, after = sum(values[:third]), sum(values[-third:])
    change = f"{100 * (after - before) / before:+,.0f} %" if before else ""
    return f"M{'L'.join(points)}", change


def _line(minutes: Sequence[Mapping[str, Any]], top: float, member: str, name: str, colour: str) -> Line:
    """Draw a line. It has a gap where a minute has no value, and a point where both neighbours have none."""
    step = WIDTH / max(1, len(minutes) - 1)
    parts, is_open = [], False
    for number, minute in enumerate(minutes):
        value = minute[member]
        if value is not None:
            point = f"{number * step:.1f} {HEIGHT - HEIGHT * value / top:.1f}"
            parts.append(f"L{point}" if is_open else f"M{point}h0.1")
        is_open = value is not None
    return Line(name, colour, "".join(parts), words(minutes[-1][member] if minutes else None))
