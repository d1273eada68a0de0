"""The figures of the table: their names, units and targets, and the parts that are measured together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.size import (
    comparing,
    head,
    keeping,
    ledger_alone,
    page,
    rates,
    rebuild,
    rules,
    seen,
    streaming,
    working,
)
from benchmarks.size.scale import Scale

#: A function that measures several figures at once: name -> value.
Measure = Callable[[Bench, Scale], Mapping[str, float]]


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    `at_most`, `at_least`: the target, in the figure's unit; neither means report only. `why`: what a value costs that
    misses the target, for the page.
    """

    name: str
    unit: str
    says: str
    at_most: float | None = None
    at_least: float | None = None
    why: str = ""

    def worst(self, values: list[float]) -> float:
        """Return the value that a table shows of several rounds."""
        return min(values) if self.at_least is not None else max(values)

    def target(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:,g}"
        return "–" if self.at_least is None else f"≥ {self.at_least:,g}"

    def reached(self, value: float) -> bool | None:
        """Return True if the value reaches the target, or None where there is no target."""
        if self.at_most is not None:
            return value <= self.at_most
        return None if self.at_least is None else value >= self.at_least


@dataclass(frozen=True)
class Part:
    """Figures that are measured together, on servers of their own."""

    measure: Measure
    figures: tuple[Figure, ...]


PARTS: Mapping[str, Part] = {
    "reconcile": Part(
        comparing.compared,
        (
            Figure("reconcile_s", "s", "one pass over 20,000 running and 80,000 waiting jobs", at_most=3),
            Figure("reconcile_admission_max_ms", "ms", "the slowest admission meanwhile", at_most=50),
            Figure("reconcile_admission_p99_ms", "ms", "of 100 admissions meanwhile the second slowest"),
            Figure("idle_admission_max_ms", "ms", "the slowest admission of the two seconds before"),
        ),
    ),
    "rebuild": Part(
        rebuild.rebuilt,
        (
            Figure("rebuild_first_s", "s", "an empty Redis until the first admission", at_most=5),
            Figure("rebuild_all_s", "s", "until 1,000 running and 100,000 waiting jobs are back", at_most=30),
            Figure("rebuild_level_s", "s", "until Postgres has all that this changed"),
            Figure("redis_bytes_per_job", "bytes", "Redis's memory for a job that waits, message included"),
        ),
    ),
    "head": Part(
        head.headed,
        (
            Figure("head_mb", "MB", "of Redis for a million waiting jobs, of which it holds 10,000", at_most=50),
            Figure("head_rebuild_s", "s", "an empty Redis until these jobs wait as before", at_most=60),
            Figure(
                "head_fetched_s",
                "jobs/s",
                "fetched from Postgres when the heads of all requests have started",
                at_least=2000,
            ),
            Figure(
                "head_slowest_ms",
                "ms",
                "the slowest script meanwhile",
                at_most=5,
                why="It is `refill`, which brings in 50 jobs of one request, with a p99 of 1.9 ms. Redis's thread goes"
                " before all other programs meanwhile, but not before the host of a virtual machine, which took 1 %"
                " of the time.",
            ),
        ),
    ),
    "workers": Part(
        working.worked,
        (
            Figure("workers_registered", "workers", "on one Redis, all beating", at_least=1000),
            Figure("workers_violations", "violations", "of the invariants, during 10,000 jobs and at rest", at_most=0),
            Figure("workers_jobs_s", "jobs/s", "submitted, run for 8 s on 2,000 slots, and ended"),
            Figure("workers_start_p95_ms", "ms", "from admission to claim, p95"),
        ),
    ),
    "ledger": Part(
        ledger_alone.alone,
        (
            Figure(
                "size_cycle",
                "×",
                "an admission and its release, beside a small idle cluster",
                at_most=1.15,
                why="By instructions the cycle costs 1.02 times one without a backlog. The rest is memory: the books of"
                " 10,000 workers do not fit into a cache. With glibc's `malloc` this figure is 1.45 to 1.65, because a"
                " backlog leaves free pieces all over its heap, where Lua gets its short-lived values.",
            ),
            Figure(
                "size_slowest_ms",
                "ms",
                "the slowest script of these while all workers beat",
                at_most=2,
                why="Redis's slow log counts time by the clock, also while another process has the core: here the"
                " caller, the other server and Postgres share two cores with it.",
            ),
            Figure(
                "size_beats_percent",
                "%",
                "of one core of Redis, for the beats of 10,000 workers",
                at_most=15,
                why="One client sends them one by one, so each also costs Redis a look at its connections and two"
                " system calls. `rate_beat_us_64` is a heartbeat among 64 clients.",
            ),
            Figure("size_new_shape_ms", "ms", "of Redis for a new request that lacks memory everywhere", at_most=1),
            Figure("size_sweep_ms", "ms", "of Redis for a sweep over 500 waiting requests", at_most=200),
            Figure(
                "size_page_ms",
                "ms",
                "of the reader's CPU for `cluster --json --limit 100`",
                at_most=200,
                why="The totals are over all workers, so the books of all are read, whichever page is shown.",
            ),
            Figure("size_whole_ms", "ms", "of the reader's CPU for `cluster --json`, all workers"),
        ),
    ),
    "rules": Part(
        rules.ruled,
        (
            *(
                Figure(
                    f"rules_{name}",
                    "×",
                    f"an admission and its release with {says}",
                    at_most=1.25,
                    why="Of two rounds on a quiet machine the other one had 1.18. Without the rules a cycle took 427 µs"
                    " in the slow round, and with 10 workers and no backlog 625, so the machine varies more.",
                )
                for name, says in (
                    ("10", "reservations and tenants: 10 workers"),
                    ("10_waiting", "reservations and tenants: 10 workers, a million jobs wait"),
                    ("10000", "reservations and tenants: 10,000 workers"),
                    ("10000_waiting", "reservations and tenants: 10,000 workers, a million jobs wait"),
                )
            ),
            Figure(
                "rules_slowest_ms",
                "ms",
                "the slowest script of these; 0.2 is the least that the slow log has",
                at_most=2,
                why="Redis's slow log counts time by the clock. The part prints the slowest scripts with their p99.",
            ),
        ),
    ),
    "rates": Part(
        rates.rated,
        (
            Figure("rate_submit_us", "µs", "of Redis's thread for a submission that is admitted; 64 clients"),
            Figure("rate_deliver_us", "µs", "for the worker's taking of the message"),
            Figure("rate_claim_us", "µs", "for the claim"),
            Figure("rate_release_us", "µs", "for the release"),
            Figure("rate_forget_us", "µs", "for dropping its entry, once Postgres has it"),
            *(Figure(f"rate_job_us_{n}", "µs", f"for all calls of a job; {n} at once") for n in rates.CLIENTS),
            *(Figure(f"rate_beat_us_{n}", "µs", f"for a heartbeat; {n} at once") for n in rates.CLIENTS),
            Figure("rate_jobs_s", "jobs/s", f"for {rates.SHARE:.0%} of a core of Redis, without heartbeats"),
        ),
    ),
    "retention": Part(
        keeping.kept,
        (
            Figure("submit_beside_finished", "×", "a submission beside a million finished rows", at_most=1.1),
            Figure("submit_beside_archived", "×", "the same when they are in the archive", at_most=1.1),
            Figure("archive_rows_s", "jobs/s", "moved into the archive: more than one ledger ends", at_least=2000),
            Figure("archive_statement_ms", "ms", "the longest statement that moved 1,000"),
            Figure("archived_bytes_per_job", "bytes", "in Postgres, for a job in the archive with one attempt"),
        ),
    ),
    "page": Part(
        page.looked_at,
        (
            Figure(
                "page_load_ms",
                "ms",
                "a page with its files, 1,000 workers and 100,000 waiting jobs",
                at_most=300,
                why="It is the slowest of six pages, that of the runs. The browser draws it on the same two cores.",
            ),
            Figure("page_load_kb", "kB", "the largest of these loads", at_most=150),
            Figure("page_follow_ms", "ms", "from a submission until an open page shows it, p50"),
            Figure(
                "page_follow_max_ms",
                "ms",
                "the slowest of these",
                at_most=1000,
                why="It is the page of the backlog: after a read of all requests it rests three times as long as that"
                " took. The page of the cluster alone needs 160 ms at the median and 1.0 s at most.",
            ),
            Figure(
                "page_cpu_percent",
                "%",
                "of a core for the page's process, while two pages follow two submissions a second",
                at_most=10,
                why="Of this time 40 % reads the books of all workers, 32 % the requests that wait with their reasons,"
                " and 27 % makes the pages. Each is read anew with a change, at most a quarter of the time.",
            ),
            Figure("page_memory_mb", "MB", "of the page's process", at_most=150),
        ),
    ),
    "bulk": Part(
        streaming.streamed,
        (
            Figure("bulk_memory_mb", "MB", "a submitter's growth from 10,000 to a million jobs", at_most=32),
            Figure("bulk_jobs_s", "jobs/s", "submitted meanwhile, all of them to wait"),
        ),
    ),
    "seen": Part(
        seen.seen,
        (
            Figure(
                "seen_infeasible_s",
                "s",
                "until `cluster` and `job` tell that no worker could run a new job, p50",
            ),
            Figure("seen_infeasible_max_s", "s", "the slowest of these", at_most=1),
            Figure("seen_cleared_s", "s", "from the registration of a worker until they have it no more, p50"),
            Figure("seen_cleared_max_s", "s", "the slowest of these", at_most=1),
            Figure("seen_tenant_s", "s", "from `tenant set` until a job starts by the new quota, p50"),
            Figure("seen_tenant_max_s", "s", "the slowest of these", at_most=1),
            Figure("seen_tenant_duty_s", "s", "the same where the program dies before it tells the ledger, p50"),
            Figure("seen_tenant_duty_max_s", "s", "the slowest of these"),
        ),
    ),
    "flood": Part(
        seen.flooded,
        (
            Figure("flood_first_start_s", "s", "the first job of a tenant behind 100,000 of another, p50"),
            Figure("flood_first_start_max_s", "s", "the slowest of these", at_most=1),
            Figure("flood_ratio", "×", "such a start, beside one on a full cluster without the flood"),
        ),
    ),
}
