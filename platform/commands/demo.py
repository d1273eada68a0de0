"""`celery -A platform demo`: a real trace through real workers, with the books balanced at the end."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from celery_capacity.platform.console import render
from celery_capacity.platform.console.command import Command, json_option, settings_of_environment
from celery_capacity.platform.console.terminal import Meters, facts, print_json, table, talk
from celery_capacity.platform.demo import trace
from celery_capacity.platform.demo.files import read_trace, write_log
from celery_capacity.platform.demo.options import log_option, scale_option, trace_option
from celery_capacity.platform.demo.predictions import Prediction, empty_seconds, mean_seconds
from celery_capacity.platform.demo.replay import WORKERS, Report, replay
from celery_capacity.platform.processes.launch import Interrupted, WorkerSpec, workers_option
from celery_capacity.routing.model.amounts import format_cpus
from celery_capacity.workers.process.exit_codes import Exit

#: Advice at the end of a demo: the next steps.
NEXT = """\
Next, run a platform that stays:     {celery} -A platform up
Look at it from a second terminal:   {celery} -A platform cluster
Submit a job to it:                  {celery} -A platform call demo.sleep --args '[5]'"""


@click.command(
    "demo",
    cls=Command,
    examples=(
        ("The packaged trace, in about a minute", "celery -A platform demo"),
        ("On workers of your sizes", "celery -A platform demo --worker big=96 --worker small=8"),
        ("Your own trace, sixty times faster", "celery -A platform demo --trace my.csv --scale 60 --log log.csv"),
    ),
    codes={
        Exit.OK: "every job ran once, and the invariants hold",
        Exit.FAILED: "that is not so, a worker could not start, or the trace is refused",
        Exit.HANGUP: Exit.HANGUP.meaning,
        Exit.TERMINATED: Exit.TERMINATED.meaning,
    },
)
@trace_option
@scale_option
@workers_option
@click.option("--expected", is_flag=True, help="Say in each call how long the job runs.")
@click.option("--whatif", is_flag=True, help="Compare forecasts made meanwhile with what happens.")
@log_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    path: Path | None,
    scale: float | None,
    workers: tuple[WorkerSpec, ...],
    expected: bool,
    whatif: bool,
    log: Path | None,
    as_json: bool,
) -> None:
    """Replay a trace of real jobs on workers of its own.

    Starts a private Redis and Postgres (unless REDIS_URL and DATABASE_URL are set) and workers, submits each
    job at its time and reports how long the jobs waited, the most that each worker held, and whether the
    books balance. Each job holds its CPUs and sleeps. All that was started is ended again.

    A trace has a header that names submit, run (seconds) and cpus; other columns and # lines are ignored. The
    packaged one has 300 jobs of five days on KTH's SP2. Without --scale it takes about a minute, and is never
    slower than the trace. With --expected each call says how long its job runs, so that reservations
    know when a wide job can start. With --whatif forecasts of `whatif` are made after each tenth of the
    submissions, and their waits stand beside the real ones. Without --worker there are worker-01=72 and
    worker-02=16. The log has the row of the trace, and seconds since the first submission.
    """
    console = talk()

    def say(line: str) -> None:
        console.print(line)

    settings = settings_of_environment()
    replayed = read_trace(path or trace.PACKAGED, scale, workers or WORKERS)
    replayed = replace(replayed, expected=expected, whatif=whatif)
    if log is not None:
        write_log(log, [])  # report a missing folder now, and not after a minute
    say(f"Replaying {len(replayed.jobs)} jobs of the trace {replayed.name} at {replayed.scale:,g}× speed.")
    try:
        with Meters(console) as meters:
            report = replay(replayed, settings, os.environ, meters, say)
    except Interrupted as interrupted:
        say("Interrupted; all that the demo had started has ended.")
        context.exit(interrupted.code)
    if log is not None:
        write_log(log, trace.log_rows(report.records, min(report.submitted.values())))
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
        facts().print()
        facts().print(next_steps(Path(sys.executable).parent, os.environ.get("PATH", "")))
    context.exit(Exit.OK if report.ok else Exit.FAILED)


def next_steps(programs: Path, path: str) -> str:
    """Return the closing hints. `programs` has the environment's `celery`, which need not be on the shell's PATH."""
    celery = programs / "celery"
    on_path = shutil.which("celery", path=path)
    if on_path is not None and Path(on_path).parent == programs:
        return NEXT.format(celery="celery")
    return NEXT.format(celery=celery.relative_to(Path.cwd()) if celery.is_relative_to(Path.cwd()) else celery)


def _show(report: Report) -> None:
    console = facts()
    summary, total = report.summary, len(report.replayed.jobs)
    states = ", ".join(f"{number} {state}" for state, number in sorted(report.states.items()))
    console.print(f"jobs      {total}: {states}")
    console.print(f"makespan  {summary.makespan:.1f} s")
    waits = (("mean", summary.wait_mean), ("p95", summary.wait_p95), ("max", summary.wait_max))
    console.print("wait      " + ", ".join(f"{what} {wait:.2f} s" for what, wait in waits))
    console.print()
    rows = []
    for worker in report.workers:
        has = "?" if worker.cpus is None else format_cpus(worker.cpus)
        average = f"{worker.average / 1000:.1f} of {has} CPUs"
        peak = format_cpus(worker.peak) + ("" if worker.fits else "  EXCEEDED")
        rows.append((worker.name, average, peak, str(worker.jobs)))
    meters = [(worker.average, worker.cpus or 0) for worker in report.workers]
    header = ("worker", "allocated on average", "peak", "jobs")
    render.table_with_bars(console, header, rows, {1: meters}, right=(3,))
    console.print()
    if report.predictions is not None:
        _show_predictions(report.predictions)
    for row, state, text in report.errors:
        console.print(f"job {row} {state}: {text}")
    if report.doubled:
        console.print(f"ran twice: {', '.join(map(str, report.doubled))}")
    render.invariants(console, report.invariants)
    console.print(render.verdict_line(report.invariants))


def _show_predictions(made: Sequence[Prediction]) -> None:
    console = facts()
    if not made:
        console.print("forecasts  none: no job waited when they were made\n")
        return
    rows = [
        (
            f"{prediction.at:.1f} s",
            str(prediction.jobs),
            _seconds(empty_seconds(prediction.predicted)),
            _seconds(empty_seconds(prediction.real)),
            _seconds(mean_seconds(prediction.predicted)),
            _seconds(mean_seconds(prediction.compared)),
        )
        for prediction in made
    ]
    table(console, ("forecast at", "waiting", "empty in", "real", "mean wait", "real"), rows, right=(0, 1, 2, 3, 4, 5))
    console.print()


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"
