"""`celery -A platform simulate`: when and where the jobs of a trace would start, by the policy in virtual time."""

from __future__ import annotations

from pathlib import Path

import click

from celery_capacity.platform.console import render
from celery_capacity.platform.console.command import Command, json_option
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.platform.demo import trace
from celery_capacity.platform.demo.files import parse_scale, read_trace, write_log
from celery_capacity.platform.demo.replay import WORKERS
from celery_capacity.platform.demo.simulated import MS, Simulated, run
from celery_capacity.platform.processes.launch import WorkerSpec, parse_workers
from celery_capacity.routing.model.amounts import format_cpus
from celery_capacity.routing.policy.reservation import RESERVE_AFTER_MS, Rules
from celery_capacity.routing.simulation.expectations import SOURCES
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "simulate",
    cls=Command,
    examples=(
        ("The packaged trace, in a second", "celery -A platform simulate"),
        ("Your trace on workers of your sizes", "celery -A platform simulate --trace my.csv --worker big=96"),
        ("Without reservations", "celery -A platform simulate --depth 0"),
    ),
    codes={Exit.OK: "the simulation is done", Exit.FAILED: "the trace is refused"},
)
@click.option(
    "--trace",
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=trace.PACKAGED,
    help="CSV to simulate, instead of the packaged trace.",
)
@click.option("--scale", metavar="N", callback=parse_scale, help="How many times faster than the trace.")
@click.option(
    "--worker", "workers", metavar="NAME=CPUS", multiple=True, callback=parse_workers, help="A worker; again for more."
)
@click.option(
    "--depth",
    metavar="N",
    type=click.IntRange(min=0),
    default=1,
    help="Blocked requests with a reservation.",
)
@click.option(
    "--reserve-after",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=RESERVE_AFTER_MS / MS,
    help="Keep a worker for a job so late.",
)
@click.option(
    "--expected",
    metavar="SOURCE",
    type=click.Choice(list(SOURCES)),
    default="exact",
    help="Expected run times: exact, learned or none.",
)
@click.option(
    "--log",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write job,start,end,worker as CSV.",
)
@json_option
def command(
    path: Path,
    scale: float | None,
    workers: tuple[WorkerSpec, ...],
    depth: int,
    reserve_after: float,
    expected: str,
    log: Path | None,
    as_json: bool,
) -> None:
    """Say when the jobs of a trace would start, by the policy alone.

    Nothing is started and no store is asked: the policy decides in virtual time, thousands of jobs a second.
    The report has how long the jobs wait, and how well the workers are used.

    A trace is as in `demo`. Its column task, or else user, says which jobs are alike. With --expected learned
    a job is expected to run as long as the jobs of its task that ended before; with exact as long as it
    does; with none nobody knows. --depth is the number of blocked requests that get a reservation: 0 is
    greedy, 1 is EASY backfill, as PLATFORM_BACKFILL_DEPTH is by default.
    """
    replayed = read_trace(path, scale or 1.0, workers or WORKERS)
    report = run(replayed, Rules(depth, round(reserve_after * MS)), expected)
    if log is not None:
        write_log(log, trace.log_rows(report.records, 0.0))
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)


def _show(report: Simulated) -> None:
    console = facts()
    replayed, rules = report.replayed, report.rules
    console.print(f"trace     {replayed.name}: {len(replayed.jobs)} jobs at {replayed.scale:,g}× speed")
    console.print(f"policy    backfill of depth {rules.depth}, expected run times: {report.expected}")
    console.print(f"makespan  {report.makespan:.1f} s, {report.packing:.3f} of the least")
    waits = (("mean", report.wait_mean), ("p50", report.wait(50)), ("p95", report.wait(95)), ("max", report.wait(100)))
    console.print("wait      " + ", ".join(f"{what} {wait:.2f} s" for what, wait in waits))
    console.print(f"heads     {report.overruns} reserved starts were overrun, {report.keepings} workers were kept")
    console.print()
    rows, meters = [], []
    for spec, average, jobs in report.workers():
        rows.append((spec.name, f"{average / 1000:.1f} of {format_cpus(spec.cpus)} CPUs", str(jobs)))
        meters.append((average, spec.cpus))
    render.table_with_bars(console, ("worker", "allocated on average", "jobs"), rows, {1: meters}, right=(2,))
