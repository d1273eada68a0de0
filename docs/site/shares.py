"""Picture of shares: `python -m docs.site.shares` simulates jobs of three tenants, and draws who held how many CPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.policy.tenants import Rule, Sharing, mean_time, tenant_term
from celery_capacity.routing.simulation.expectations import Unknown
from celery_capacity.routing.simulation.jobs import Start, Submission
from celery_capacity.routing.simulation.shares import Shares
from celery_capacity.routing.simulation.simulation import simulate
from docs.site.backfill import FONT

PICTURE: Final = Path(__file__).resolve().parents[1] / "pictures" / "shares.svg"

#: Tenants with their weights and colours.
WEIGHTS: Final = {"physics": 2, "art": 1, "biology": 1}
COLOURS: Final = {"physics": "#2563eb", "art": "#ea580c", "biology": "#64748b"}
#: Minutes between which `physics` submits nothing, and has nothing left.
IDLE: Final = (20, 40)
CPUS: Final = 16
MINUTES: Final = 60
#: Milliseconds in a minute.
MINUTE: Final = 60_000
#: Half-life of past use in seconds, as PLATFORM_SHARE_HALF_LIFE is by default.
HALVES_IN: Final = 600.0

#: Pixels.
LEFT, WIDTH, TOP, HEIGHT, BOTTOM = 90, 860, 66, 288, 74


def submissions() -> list[Submission]:
    """Return jobs of one CPU for about four minutes. Each tenant has more than it can start, but for the idle time."""
    jobs = []
    for tenant in WEIGHTS:
        times = [0] * 400
        if tenant == "physics":
            # So many as it can start before it is idle.
            times = [0] * (8 * IDLE[0] // 4) + [IDLE[1] * MINUTE] * 200
        for number, at in enumerate(times):
            run = 3 * MINUTE + (number * 7 + len(tenant) * 5) % 13 * MINUTE // 6
            terms = tenant_term(tenant)
            jobs.append(Submission(f"{tenant}-{number}", at, run, Request.of({"cpus": 1}), tenant, terms=terms))
    return jobs


def starts() -> list[Start]:
    """Return the starts of all jobs on one worker."""
    capacity = {"cpus": CPUS, "slots": CPUS}
    sharing = Sharing({tenant: Rule(weight) for tenant, weight in WEIGHTS.items()}, total=capacity)
    shares = Shares(sharing, mean_time(HALVES_IN))
    return simulate(submissions(), {"worker": Book("worker", capacity, {})}, Rules(0), Unknown(), shares).starts


def held(jobs: Sequence[Start]) -> list[tuple[int, Mapping[str, int]]]:
    """Return the CPUs of each tenant from each time (ms) on at which they change, up to the end of the picture."""
    changes = sorted({time for job in jobs for time in (job.started, job.ended) if time < MINUTES * MINUTE})
    return [
        (
            time,
            {
                tenant: sum(job.started <= time < job.ended for job in jobs if job.job.startswith(f"{tenant}-"))
                for tenant in WEIGHTS
            },
        )
        for time in changes
    ]


def areas(steps: Sequence[tuple[int, Mapping[str, int]]]) -> list[str]:
    """Return the areas of the tenants, one above the other."""
    scale, unit = WIDTH / (MINUTES * MINUTE), HEIGHT / CPUS
    ends = [time for time, _ in steps[1:]] + [MINUTES * MINUTE]
    parts, below = [], [0] * len(steps)
    for tenant in reversed(WEIGHTS):
        above = [base + cpus[tenant] for base, (_, cpus) in zip(below, steps, strict=True)]
        edges = []
        for levels in (above, below):
            line = []
            for (time, _), end, level in zip(steps, ends, levels, strict=True):
                y = TOP + HEIGHT - level * unit
                line += [f"{LEFT + time * scale:.1f} {y:.0f}", f"{LEFT + end * scale:.1f} {y:.0f}"]
            edges.append(line)
        path = "L".join([*edges[0], *reversed(edges[1])])
        parts.append(f'<path d="M{path}Z" fill="{COLOURS[tenant]}" stroke="#ffffff" stroke-width="1"/>')
        below = above
    return parts


def labels() -> list[str]:
    """Return the names of the tenants, the idle time, and the axes."""
    scale = WIDTH / MINUTES
    parts = []
    x = LEFT
    for tenant, weight in WEIGHTS.items():
        parts.append(f'<rect x="{x}" y="{TOP - 26}" width="14" height="14" rx="3" fill="{COLOURS[tenant]}"/>')
        parts.append(f'<text x="{x + 20}" y="{TOP - 14}" fill="#0f172a">{tenant}, weight {weight}</text>')
        x += 170
    for minute, words in zip(IDLE, ("physics has no jobs left: others borrow", "physics comes back"), strict=True):
        at = LEFT + minute * scale
        end = TOP + HEIGHT
        parts.append(f'<path d="M{at:.1f} {TOP}V{end + 8}" stroke="#0f172a" stroke-width="2" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{at:.1f}" y="{end + 24}" fill="#0f172a">{words}</text>')
    parts.append(
        f'<text x="{LEFT - 10}" y="{TOP + HEIGHT / 2 + 5:.0f}" text-anchor="end" fill="#475569">16 CPUs</text>'
    )
    for minute in range(0, MINUTES + 1, 10):
        x_mark, y_mark = LEFT + minute * scale, TOP + HEIGHT + BOTTOM - 20
        parts.append(f'<text x="{x_mark:.1f}" y="{y_mark}" text-anchor="middle" fill="#475569">{minute} min</text>')
    return parts


def draw() -> str:
    """Return the picture as SVG."""
    height = TOP + HEIGHT + BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {height}" role="img" {FONT} font-size="13">',
            "<title>CPUs of three tenants over an hour, one of which has no jobs for a while</title>",
            f'<rect width="980" height="{height}" rx="10" fill="#ffffff"/>',
            *areas(held(starts())),
            *labels(),
            "</svg>\n",
        ]
    )


def main() -> None:
    """Draw the picture anew."""
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
