"""Picture of a backfill: `python -m docs.site.backfill` simulates some jobs by the policy, and draws when they run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.simulation.expectations import Exact
from celery_capacity.routing.simulation.jobs import Start, Submission
from celery_capacity.routing.simulation.simulation import simulate

PICTURE: Final = Path(__file__).resolve().parents[1] / "pictures" / "backfill.svg"

#: Job, minute of its submission, minutes that it runs, CPUs.
JOBS: Final = (
    ("A", 0, 10, 4),
    ("B", 0, 6, 2),
    ("wide", 1, 5, 8),
    ("C", 2, 12, 2),
    ("D", 3, 6, 2),
    ("E", 5, 9, 2),
    ("F", 6, 4, 3),
    ("G", 9, 8, 3),
    ("H", 12, 7, 2),
    ("I", 16, 6, 4),
)
CPUS: Final = 8
MINUTES: Final = 40
#: Milliseconds in a minute.
MINUTE: Final = 60_000

#: Pixels.
LEFT, WIDTH, LANE, TOP, PANEL = 90, 860, 18, 66, 214
FONT: Final = "font-family=\"system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\""


def starts(depth: int) -> list[Start]:
    """Return the starts of the jobs with backfill of a depth."""
    submissions = [
        Submission(job, at * MINUTE, run * MINUTE, Request.of({"cpus": cpus})) for job, at, run, cpus in JOBS
    ]
    books = {"worker": Book("worker", {"cpus": CPUS, "slots": CPUS}, {})}
    return simulate(submissions, books, Rules(depth, MINUTES * MINUTE), Exact()).starts


def lanes(jobs: Sequence[Start], cpus: dict[str, int]) -> dict[str, list[int]]:
    """Return for each job the CPUs on which it is drawn: the lowest ones that are free."""
    busy_until = [0] * CPUS
    drawn: dict[str, list[int]] = {}
    for start in jobs:
        free = [lane for lane in range(CPUS) if busy_until[lane] <= start.started]
        drawn[start.job] = free[: cpus[start.job]]
        for lane in drawn[start.job]:
            busy_until[lane] = start.ended
    return drawn


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges of neighbouring numbers: (first, length)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and sum(ranges[-1]) == number:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((number, 1))
    return ranges


def panel(title: str, depth: int, top: int) -> list[str]:
    """Return the drawing of one simulation, below a title."""
    jobs, cpus = starts(depth), {job: cpus for job, _, _, cpus in JOBS}
    scale, wide = WIDTH / MINUTES, next(start for start in jobs if start.job == "wide")
    waited = (wide.started - wide.submitted) // MINUTE
    parts = [
        f'<text x="{LEFT}" y="{top - 10}" fill="#0f172a" font-weight="600">{title}: wide waits {waited} minutes</text>',
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{CPUS * LANE}" fill="#f8fafc" stroke="#cbd5e1"/>',
        f'<text x="{LEFT - 10}" y="{top + CPUS * LANE / 2 + 5:.0f}" text-anchor="end" fill="#475569">8 CPUs</text>',
    ]
    for start in jobs:
        colour = "#ea580c" if start.job == "wide" else "#2563eb" if start.started >= wide.started else "#64748b"
        x, length = LEFT + start.started / MINUTE * scale, (start.ended - start.started) / MINUTE * scale
        for lane, height in runs(lanes(jobs, cpus)[start.job]):
            y = top + lane * LANE
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1}" width="{length - 2:.1f}" height="{height * LANE - 2}" rx="3"'
                f' fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{x + length / 2:.1f}" y="{y + height * LANE / 2 + 5:.1f}" text-anchor="middle"'
                f' fill="#ffffff">{start.job}</text>'
            )
    x = LEFT + wide.submitted / MINUTE * scale
    parts.append(
        f'<path d="M{x:.1f} {top}V{top + CPUS * LANE + 8}" stroke="#ea580c" stroke-width="2" stroke-dasharray="4 3"/>'
    )
    parts.append(f'<text x="{x:.1f}" y="{top + CPUS * LANE + 22}" fill="#ea580c">wide comes</text>')
    return parts


def draw() -> str:
    """Return the picture as SVG."""
    height = TOP + 2 * PANEL
    marks = [
        f'<text x="{LEFT + minute / MINUTES * WIDTH:.1f}" y="{height - 12}" text-anchor="middle">{minute} min</text>'
        for minute in range(0, MINUTES + 1, 10)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {height}" role="img" {FONT} font-size="13">',
            "<title>The jobs of one worker without a reservation, and with EASY backfill</title>",
            f'<rect width="980" height="{height}" rx="10" fill="#ffffff"/>',
            *panel("Greedy (--depth 0)", 0, TOP - 26),
            *panel("EASY backfill (--depth 1)", 1, TOP - 26 + PANEL),
            '<g fill="#475569">',
            *marks,
            "</g>",
            "</svg>\n",
        ]
    )


def main() -> None:
    """Draw the picture anew."""
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
