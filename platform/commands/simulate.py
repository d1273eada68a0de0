"""`celery -A platform simulate`: when and where the jobs of a trace would start, by the policy in virtual time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from celery_capacity.platform.console import render
from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.durations import Duration
from celery_capacity.platform.console.terminal import facts, print_json, table, talk
from celery_capacity.platform.demo import trace
from celery_capacity.platform.demo.files import read_trace, write_log
from celery_capacity.platform.demo.options import log_option, scale_option, tenants_option, trace_option
from celery_capacity.platform.demo.replay import WORKERS
from celery_capacity.platform.demo.simulated import MS, Case, Simulated, books_of, run
from celery_capacity.platform.processes.launch import WorkerSpec, parse_workers
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.amounts import CPUS, DEFAULT_QUEUE, format_cpus
from celery_capacity.routing.policy.labels import Place, place_of
from celery_capacity.routing.policy.reservation import RESERVE_AFTER_MS, Rules
from celery_capacity.routing.policy.tenants import Rule, tenant_of, tenant_term
from celery_capacity.routing.simulation.expectations import SOURCES
from celery_capacity.routing.simulation.jobs import Submission
from celery_capacity.workers.display.progress_bar import command_bar
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "simulate",
    cls=Command,
    examples=(
        ("The packaged trace, in a second", "celery -A platform simulate"),
        ("Your trace on workers of your sizes", "celery -A platform simulate --trace my.csv --worker big=96"),
        ("Without reservations", "celery -A platform simulate --depth 0"),
        ("The jobs of a week on other workers", "celery -A platform simulate --from-history 7d --worker big=128"),
    ),
    codes={Exit.OK: "the simulation is done", Exit.FAILED: "the trace is refused, or there is no history"},
)
@trace_option
@click.option(
    "--from-history",
    "history",
    metavar="TIME",
    type=Duration(),
    help="Simulate the jobs of the last 7d, 12h, ... instead.",
)
@scale_option
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
    help="Expected run times: exact, learned, recorded or none.",
)
@tenants_option
@log_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    path: Path | None,
    history: float | None,
    scale: float | None,
    workers: tuple[WorkerSpec, ...],
    weights: dict[str, int],
    depth: int,
    reserve_after: float,
    expected: str,
    log: Path | None,
    as_json: bool,
) -> None:
    """Say when the jobs of a trace would start, by the policy alone.

    Nothing is started. The policy decides in virtual time, thousands of jobs a second.
    The report has how long the jobs wait, and how well the workers are used.

    A trace is as in `demo`. Its column task, or else user, says which jobs are alike, and its column tenant
    whose they are. With --expected learned a job is expected to run as long as PLATFORM_LEARN_RUN_TIMES
    would have learned from the jobs that ended before; with exact as long as it does; with recorded, of a
    history, as was expected when it came; with none nobody knows. --depth is the number of blocked
    requests that get a reservation: 0 is greedy, 1 is EASY backfill, as PLATFORM_BACKFILL_DEPTH is by default.

    With --from-history the trace is that of the jobs which came in the last days and have ended, by Postgres:
    at most the newest 50,000. Without --worker they run on the workers that live now, with the rules of tenants;
    with it, on machines on which any job may run that fits.
    """
    if history is None:
        case = Case.of_trace(read_trace(path or trace.PACKAGED, scale or 1.0, workers or WORKERS), weights)
    elif path is not None or scale is not None:
        raise click.UsageError("--from-history takes neither --trace nor --scale: it is a trace at its own speed.")
    else:
        case = _case_of_history(context, history, workers, weights)
    with command_bar("simulated jobs", len(case.jobs)) as bar:
        report = run(case, Rules(depth, round(reserve_after * MS)), expected, bar.advance)
    if log is not None:
        write_log(log, trace.log_rows(report.records, 0.0))
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)


def _case_of_history(
    context: click.Context, seconds: float, workers: tuple[WorkerSpec, ...], weights: dict[str, int]
) -> Case:
    """Return the jobs of the last seconds on the given workers, or on those that live now. Raise InvalidRequest."""
    from celery_capacity.routing.database.tenants import tenant_rules
    from celery_capacity.routing.forecast.cluster import live_books
    from celery_capacity.routing.forecast.history import read_history

    stores = stores_of(context)
    with stores.engine.execution_options(isolation_level="REPEATABLE READ").connect() as connection:
        read = read_history(connection, seconds)
        rules = tenant_rules(connection)
        live = [] if workers else live_books(connection, stores.settings.worker_ttl)
    if not workers and not live:
        raise InvalidRequest(
            "no worker lives, on which the jobs could be simulated",
            value=None,
            advice="Name workers: --worker big=cpus:72,memory:256GiB",
        )
    if read.cut:
        talk().print(f"Only the newest {len(read.jobs):,} jobs are simulated.")
    rules |= {tenant: replace(rules.get(tenant, Rule()), weight=weight) for tenant, weight in weights.items()}
    books = books_of(workers) if workers else {book.worker: replace(book, left=None) for book in live}
    jobs = [_anywhere(job) for job in read.jobs] if workers else read.jobs
    return Case("history", 1.0, jobs, books).sharing(rules, stores.settings.share_halves_in)


def _anywhere(job: Submission) -> Submission:
    """Return a job that may run on any worker: without its queue, its labels and the name of its worker.

    It still has its worker alone if it asked for that, and still goes where most CPUs are free.
    """
    asked_place = place_of(job.terms)
    terms = Place(exclusive=asked_place.exclusive, spread=asked_place.spread).terms + tenant_term(tenant_of(job.terms))
    return job._replace(request=job.request.within(DEFAULT_QUEUE), terms=terms)


def _show(report: Simulated) -> None:
    console = facts()
    case, rules = report.case, report.rules
    console.print(f"trace     {case.name}: {len(case.jobs)} jobs at {case.scale:,g}× speed")
    if report.never:
        console.print(f"never     {report.never} jobs fit on no worker")
    console.print(f"policy    backfill of depth {rules.depth}, expected run times: {report.expected}")
    console.print(f"makespan  {report.makespan:.1f} s, {report.packing:.3f} of the least")
    waits = (("mean", report.wait_mean), ("p50", report.wait(50)), ("p95", report.wait(95)), ("max", report.wait(100)))
    console.print("wait      " + ", ".join(f"{what} {wait:.2f} s" for what, wait in waits))
    console.print(f"heads     {report.overruns} reserved starts were overrun, {report.keepings} workers were kept")
    console.print()
    rows, meters = [], []
    for book, average, jobs in report.workers():
        cpus = book.capacity.get(CPUS, 0)
        rows.append((book.worker, f"{average / 1000:.1f} of {format_cpus(cpus)} CPUs", str(jobs)))
        meters.append((average, cpus))
    render.table_with_bars(console, ("worker", "allocated on average", "jobs"), rows, {1: meters}, right=(2,))
    if tenants := {tenant: waits for tenant, waits in report.tenants().items() if waits}:
        console.print()
        lines = [
            (tenant, str(len(waits)), f"{sum(waits) / len(waits):.1f} s", f"{max(waits):.1f} s")
            for tenant, waits in tenants.items()
        ]
        table(console, ("tenant", "jobs", "mean wait", "longest"), lines, right=(1, 2, 3))
