"""The picture of the clusters that one ledger carries, as SVG: `python -m benchmarks.size.drawing` draws it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.size.rates import CLIENTS, SHARE, jobs_a_second
from benchmarks.size.report import Report
from benchmarks.steady.drawing import step_of

PICTURE: Final = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "size.svg"

#: Size of the picture, and the frame of the plot in it: left, top, right, bottom.
WIDTH, HEIGHT = 960, 460
LEFT, TOP, RIGHT, BOTTOM = 80, 84, 930, 390

#: Workers at the right edge.
MOST: Final = 20_000
#: Colour of the line of each number of clients.
COLOURS: Final = dict(zip(CLIENTS, ("#94a3b8", "#d97706", "#2563eb"), strict=True))


def svg(costs: dict[int, tuple[float, float]]) -> str:
    """Return the picture: the highest rate by the number of workers, a line for each number of clients.

    `costs`: by the number of clients, microseconds of Redis for a job and for a heartbeat.
    """
    highest = max(jobs_a_second(job, beat, 0) for job, beat in costs.values()) * 1.1

    def x(workers: float) -> float:
        return LEFT + (RIGHT - LEFT) * workers / MOST

    def y(rate: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * rate / highest

    parts = [_head(), '<g stroke="#e2e8f0">']
    step = step_of(highest)
    rates = [number * step for number in range(int(highest / step) + 1)]
    parts += [f'<path d="M{LEFT} {y(rate):.1f}H{RIGHT}"/>' for rate in rates]
    parts += ["</g>", '<g fill="#475569" font-size="13">']
    parts += [f'<text x="{LEFT - 10}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate:,g}</text>' for rate in rates]
    for workers in range(0, MOST + 1, 2500):
        parts.append(f'<text x="{x(workers):.1f}" y="{BOTTOM + 22}" text-anchor="middle">{workers:,}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 46}" text-anchor="middle">live workers</text></g>')
    for clients, (job, beat) in costs.items():
        path = "L".join(f"{x(n):.1f} {y(jobs_a_second(job, beat, n)):.1f}" for n in range(0, MOST + 1, 250))
        parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[clients]}" stroke-width="2.5"/>')
    return "\n".join([*parts, *_legend(costs), "</svg>", ""])


def draw(report: Report) -> None:
    """Write the picture of the docs, where the report has the rates."""
    values = report.values
    if f"rate_job_us_{CLIENTS[0]}" in values:
        costs = {n: (max(values[f"rate_job_us_{n}"]), max(values[f"rate_beat_us_{n}"])) for n in CLIENTS}
        PICTURE.write_text(svg(costs), encoding="utf-8")


def _head() -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        "font-family=\"system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\" font-size=\"15\">\n"
        "<title>Highest rate of jobs on one Redis by the number of live workers</title>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>\n'
        f'<text x="{LEFT}" y="34" fill="#0f172a" font-weight="600">'
        f"Jobs a second that take {SHARE:.0%} of a core of Redis, with the heartbeats of all workers</text>"
    )


def _legend(costs: dict[int, tuple[float, float]]) -> list[str]:
    """Return the legend above the plot."""
    parts = ['<g fill="#334155" font-size="13">']
    left = LEFT
    for clients, (job, _) in costs.items():
        parts.append(f'<path d="M{left} 58h34" stroke="{COLOURS[clients]}" stroke-width="2.5"/>')
        label = f"{clients} {'client' if clients == 1 else 'clients'} at once: {job:.0f} µs a job"
        parts.append(f'<text x="{left + 42}" y="62">{label}</text>')
        left += 270
    return [*parts, "</g>"]


if __name__ == "__main__":
    draw(Report.read())
