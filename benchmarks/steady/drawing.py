"""The curve of latency by rate as SVG, with no tool but text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

#: Points of a side: share of its highest rate, jobs a second, and milliseconds at p50 and p95.
Points = Sequence[Mapping[str, float]]

#: Size of the picture, and the frame of the plot in it: left, top, right, bottom.
WIDTH, HEIGHT = 960, 460
LEFT, TOP, RIGHT, BOTTOM = 80, 84, 930, 390

#: Label and colour of each side.
SIDES = {"ours": ("celery-capacity", "#2563eb"), "plain": ("plain Celery", "#d97706")}

#: Lines of a side: the percentile, its label, and its dashes.
LINES = {"p50": ("median", ""), "p95": ("p95", "7 5")}


def svg(curve: Mapping[str, Points]) -> str:
    """Return the picture: latency on a logarithmic scale by jobs a second, a line for each side and percentile."""
    rates = [point["rate"] for points in curve.values() for point in points]
    values = [point[name] for points in curve.values() for point in points for name in LINES]
    most = max(rates) * 1.05
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    if low == high:
        high += 1

    def x(rate: float) -> float:
        return LEFT + (RIGHT - LEFT) * rate / most

    def y(milliseconds: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(milliseconds) - low) / (high - low)

    parts = [_head(), '<g stroke="#e2e8f0">']
    decades = [10.0**power for power in range(low, high + 1)]
    parts += [f'<path d="M{LEFT} {y(value):.1f}H{RIGHT}"/>' for value in decades]
    parts += ["</g>", '<g fill="#475569" font-size="13">']
    parts += [f'<text x="{LEFT - 10}" y="{y(v) + 4:.1f}" text-anchor="end">{v:,g} ms</text>' for v in decades]
    step = step_of(most)
    for number in range(int(most / step) + 1):
        parts.append(
            f'<text x="{x(number * step):.1f}" y="{BOTTOM + 22}" text-anchor="middle">{number * step:g}</text>'
        )
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{BOTTOM + 46}" text-anchor="middle">jobs a second that arrive</text>')
    parts.append("</g>")
    for side, points in curve.items():
        colour = SIDES[side][1]
        for name, (_, dashes) in LINES.items():
            path = "L".join(f"{x(point['rate']):.1f} {y(point[name]):.1f}" for point in points)
            dash = f' stroke-dasharray="{dashes}"' if dashes else ""
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.5"{dash}/>')
            for point in points:
                about = f"{point['share']:.0%} of the highest rate, {point['rate']:.0f}/s: {point[name]:.3g} ms"
                circle = f'cx="{x(point["rate"]):.1f}" cy="{y(point[name]):.1f}" r="4" fill="{colour}"'
                parts.append(f"<circle {circle}><title>{escape(about)}</title></circle>")
    return "\n".join([*parts, *_legend(list(curve)), "</svg>", ""])


def _head() -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        "font-family=\"system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\" font-size=\"15\">\n"
        "<title>Latency of a job by the rate at which jobs arrive, ours and plain Celery</title>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>\n'
        f'<text x="{LEFT}" y="34" fill="#0f172a" font-weight="600">'
        "From the moment at which a job is due to its end, at 25, 50, 75 and 90 % of the highest rate</text>"
    )


def _legend(sides: Sequence[str]) -> list[str]:
    """Return the legend above the plot."""
    parts = ['<g fill="#334155" font-size="13">']
    left = LEFT
    for side in sides:
        label, colour = SIDES[side]
        for name, dashes in LINES.values():
            dash = f' stroke-dasharray="{dashes}"' if dashes else ""
            parts.append(f'<path d="M{left} 58h34" stroke="{colour}" stroke-width="2.5"{dash}/>')
            parts.append(f'<text x="{left + 42}" y="62">{escape(label)}, {name}</text>')
            left += 215
    return [*parts, "</g>"]


def step_of(most: float) -> float:
    """Return a round distance of the marks on an axis that ends at `most`: five to ten of them fit.

    >>> step_of(950.0)
    100.0
    """
    power = 10.0 ** math.floor(math.log10(most))
    return next(power * part for part in (0.1, 0.2, 0.5, 1) if most / (power * part) <= 10)
