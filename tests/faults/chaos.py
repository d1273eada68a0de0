"""Random faults under load, and the oracle's counts at the end, which must all be 0.

    python -m tests.faults.chaos --seconds 480 --seed 1
    python -m tests.faults.chaos --seconds 60 --only stalled-postgres
    python -m tests.faults.judge build/chaos/1.jsonl

Three to four workers with prefork and threads work while something breaks every 4 to 8 s. In a third of the moments two
things break at once. Beat is dead in the second half. All intervals of the platform are a tenth of the usual ones. The
seed is printed and chooses every fault; `--plan` shows them. The seed does not determine how the machine reacts to a
fault.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.ledger import keys
from tests.faults.breaking import faults as breaking
from tests.faults.breaking import lasting, processes
from tests.faults.breaking.faults import World
from tests.faults.breaking.servers import own_servers, small_disk
from tests.faults.clients.load import LOOK_EVERY, QUOTAS, Load
from tests.faults.judging import history
from tests.faults.judging.healing import Times, times_of
from tests.faults.judging.oracle import COUNTS, Verdict
from tests.faults.plan import KINDS, WORKERS, Fault, matching, plan
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY

#: Seconds between two lines of progress: on a terminal, and elsewhere.
SHOW_EVERY: Final = (1.0, 10.0)
#: Part of the run in which all jobs are submitted. Refused submissions are repeated later.
SUBMIT_PART: Final = 0.95
#: Submissions a second, of which some two thirds keep the workers busy.
JOBS_A_SECOND: Final = 42.5
#: Seconds within which Postgres must answer before it is given up. A stalled Postgres outlasts them.
STORE_TIMEOUT: Final = "3"
#: Seconds after which a worker is kept for a blocked job, and the beginning of the line in which a worker logs it.
RESERVE_AFTER: Final = "1"
RESERVED: Final = "duty reserve: reserved"
#: Seconds for all jobs to end after the last fault.
REST_WITHIN: Final = 180.0


@dataclass
class Outcome:
    """The outcome of a run.

    `verdict` has the jobs concerned for each count.
    """

    seed: int
    seconds: float
    faults: list[Fault]
    accepted: int = 0
    refused: int = 0
    unsure: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    times: dict[str, list[Times]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    #: Passes of the duties after which a worker was reserved for a wide job.
    reservations: int = 0
    #: The history of the run.
    records: list[history.Record] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "jobs": self.accepted,
            "refused": self.refused,
            "unsure": self.unsure,
            "faults": len(self.faults),
            "counts": self.verdict.counts,
            "found": {name: lines for name, lines in self.verdict.found.items() if lines},
            "healing": {kind: summary(times) for kind, times in sorted(self.times.items())},
            "counters": self.counters,
            "reservations": self.reservations,
        }


def summary(times: list[Times]) -> dict[str, Any]:
    """Return the median and the maximum of the healing times, in seconds, over all faults of a kind."""
    firsts = [healing.first for healing in times if healing.first is not None]
    alls = [healing.all for healing in times if healing.all is not None]
    return {
        "faults": len(times),
        "first": {"median": round(median(firsts), 2), "most": round(max(firsts), 2)} if firsts else None,
        "all": {"median": round(median(alls), 2), "most": round(max(alls), 2)} if alls else None,
    }


def run(seed: int, seconds: float, jobs: int, faults: list[Fault], folder: Path, say: Callable[[str], None]) -> Outcome:
    """Run once and return the outcome.

    `say` gets a line for each fault and for each process that ended unasked.
    """
    outcome = Outcome(seed, seconds, faults)
    with (
        small_disk() as disk,
        own_servers(disk) as servers,
        breaking.world(
            servers, folder, PLATFORM_STORE_TIMEOUT=STORE_TIMEOUT, PLATFORM_RESERVE_AFTER=RESERVE_AFTER
        ) as world,
    ):
        if disk is None and any(fault.kind == lasting.DISK_IS_FULL for fault in faults):
            say("no disk can be mounted here: it is not filled")
            outcome.faults = faults = [fault for fault in faults if fault.kind != lasting.DISK_IS_FULL]
        submitter = Submitter(world.platform)
        started = [world.start(name) for name, *_ in WORKERS]
        for worker in started:
            worker.wait_for(READY)
        for tenant, quota in QUOTAS.items():
            world.platform.celery("tenant", "set", tenant, "--quota", quota).check_returncode()
        world.beat = world.platform.start("beat", "beat", "--schedule", str(folder / "schedule"))
        load = Load(world, submitter, jobs, seconds * SUBMIT_PART, seed)
        began = time.monotonic()
        load.start()
        _break_all(world, load, outcome.faults, began, seconds, say)
        say(f"{seconds:6.1f} s: nothing breaks any more")
        load.finish(REST_WITHIN)
        processes.account(world)
        with _tended(world, say):
            outcome.verdict = world.oracle.verdict(REST_WITHIN)
        outcome.accepted = len(world.oracle.values)
        outcome.refused, outcome.unsure = load.refused, load.unsure
        outcome.times = times_of(world.oracle, [(fault.kind, began + fault.until) for fault in outcome.faults])
        outcome.counters = _counters(world)
        outcome.reservations = sum(
            RESERVED in line for process in world.platform.processes for line in list(process.lines)
        )
        outcome.seconds = time.monotonic() - began
        outcome.records = [*_run_of(outcome, began), *world.oracle.records]
        if not outcome.verdict.zeros:
            _keep(world, folder)
        submitter.close()
    return outcome


def _break_all(
    world: World, load: Load, faults: list[Fault], began: float, seconds: float, say: Callable[[str], None]
) -> None:
    """Begin and end each fault at its time, and start ended workers again meanwhile."""
    to_begin, open_ways = list(faults), list[tuple[float, Fault, Generator[None, None, None]]]()
    beat_lives, pause = True, threading.Event()
    while (now := time.monotonic() - began) < seconds:
        for line in world.tend():
            say(f"{now:6.1f} s: {line}, unasked")
        if beat_lives and now >= seconds / 2:
            beat_lives = False
            world.kill_beat()
            say(f"{now:6.1f} s: beat is dead from here on")
        _end_due(open_ways, began)
        while to_begin and to_begin[0].at <= now:
            # A fault may take long to begin: the ends that are due by then come first.
            _end_due(open_ways, began)
            fault = to_begin.pop(0)
            say(str(fault))
            way = breaking.begin(world, fault)
            if fault.until > fault.at:
                open_ways.append((fault.until, fault, way))
            else:
                breaking.end(way)
        if load.error is not None:
            raise load.error
        pause.wait(LOOK_EVERY)
    for _, _, way in open_ways:
        breaking.end(way)


def _end_due(open_ways: list[tuple[float, Fault, Generator[None, None, None]]], began: float) -> None:
    """End the faults whose time is over."""
    now = time.monotonic() - began
    for entry in [entry for entry in open_ways if entry[0] <= now]:
        open_ways.remove(entry)
        breaking.end(entry[2])


@contextmanager
def _tended(world: World, say: Callable[[str], None]) -> Generator[None, None, None]:
    """Start ended workers again while the block waits."""
    over = threading.Event()

    def tend() -> None:
        while not over.wait(LOOK_EVERY):
            for line in world.tend():
                say(f"{line}, unasked")

    thread = threading.Thread(target=tend, name="tend", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _run_of(outcome: Outcome, began: float) -> Generator[history.Record, None, None]:
    """Yield the records of the run itself: the seed, its faults and the counters at the end."""
    yield {"what": "run", "seed": outcome.seed, "seconds": outcome.seconds, "at": began}
    for fault in outcome.faults:
        when = {"at": began + fault.at, "until": began + fault.until}
        yield {"what": "fault", "kind": fault.kind, **when, "worker": fault.worker}
    for name, value in outcome.counters.items():
        yield {"what": "counter", "name": name, "value": value}


def _counters(world: World) -> dict[str, int]:
    counters: Any = world.platform.redis.hgetall(keys.COUNTERS)
    return {name.decode(): int(value) for name, value in sorted(counters.items())}


def _keep(world: World, folder: Path) -> None:
    """Write the output of the processes beside the trace."""
    for number, process in enumerate(world.platform.processes):
        (folder / f"{number:03d}-{process.name}.log").write_text(process.tail(5_000))


# -- the command


@click.command()
@click.option("--seconds", default=480.0, show_default=True, help="How long things break.")
@click.option("--jobs", type=int, help=f"Submissions meanwhile; {JOBS_A_SECOND:g} a second without it.")
@click.option("--seed", type=int, help="Chooses the faults; a random one is taken and printed without it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--without", multiple=True, help="Leave out this kind of fault. May be given more than once.")
@click.option("--only", multiple=True, help="Only kinds with all of these words: stalled-postgres. May be given often.")
@click.option("--kinds", is_flag=True, help="Print the kinds of faults and do nothing.")
@click.option(
    "--history",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the history goes: build/chaos/SEED.jsonl without it. `python -m tests.faults.judge` reads it.",
)
@click.option("--plan", "plan_only", is_flag=True, help="Print the faults of this seed and do nothing.")
def main(
    seconds: float,
    jobs: int | None,
    seed: int | None,
    as_json: bool,
    without: tuple[str, ...],
    only: tuple[str, ...],
    kinds: bool,
    file: Path | None,
    plan_only: bool,
) -> None:
    """Break things at random under load, and count what was lost, doubled, leaked or overcommitted."""
    if kinds:
        for kind in KINDS:
            click.echo(kind.name)
        return
    seed = int(time.time()) % 1_000_000 if seed is None else seed
    jobs = round(seconds * JOBS_A_SECOND) if jobs is None else jobs
    try:
        chosen = [name for wanted in only for name in matching(wanted)]
        left_out = {name for wanted in without for name in matching(wanted)}
    except ValueError as error:
        raise click.BadParameter(f"{error}; --kinds prints them") from error
    # Silence the submitter: its warnings about broken stores are expected here.
    logging.disable(logging.WARNING)
    talk = Console(stderr=True, highlight=False)
    faults = [fault for fault in plan(seed, seconds, chosen) if fault.kind not in left_out]
    if plan_only:
        for fault in faults:
            click.echo(fault)
        return
    talk.print(f"seed {seed}: {jobs} jobs in {seconds:g} s, {len(faults)} faults")
    folder = Path(tempfile.mkdtemp(prefix="celery-capacity-chaos-"))
    folder.chmod(0o711)
    with _progress(talk) as say:
        outcome = run(seed, seconds, jobs, faults, folder, say)
    file = file or Path("build") / "chaos" / f"{seed}.jsonl"
    history.write(file, outcome.records)
    talk.print(f"The history is in {file}: python -m tests.faults.judge {file}", markup=False)
    if as_json:
        click.echo(json.dumps(outcome.to_json(), indent=2))
    else:
        show(outcome)
    if not outcome.verdict.zeros:
        talk.print(f"The trace and what the processes said are in {folder}")
        raise SystemExit(1)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _progress(talk: Console) -> Generator[Callable[[str], None], None, None]:
    """Yield a function that shows a line of progress.

    On a terminal the last fault stands in one line that changes. Elsewhere each fault has its line.
    """
    if not talk.is_terminal:
        yield lambda line: talk.print(line, markup=False)
        return
    with talk.status("starting") as status:

        def say(line: str) -> None:
            status.update(line)

        yield say


def show(outcome: Outcome) -> None:
    """Print the outcome for people."""
    click.echo(
        f"seed {outcome.seed}: {outcome.accepted} jobs accepted, {outcome.refused} submissions refused, "
        f"{outcome.unsure} with unknown outcome, {len(outcome.faults)} faults in {outcome.seconds:.0f} s"
    )
    click.echo(f"\n{'healing (s)':<40}{'faults':>7}{'first start':>18}{'all over':>18}")
    click.echo(f"{'':<40}{'':>7}{'median':>9}{'most':>9}{'median':>9}{'most':>9}")
    for kind, times in sorted(outcome.times.items()):
        figures = summary(times)
        cells = [figures[name] and figures[name][part] for name in ("first", "all") for part in ("median", "most")]
        shown = "".join(f"{'-' if cell is None else format(cell, '.1f'):>9}" for cell in cells)
        click.echo(f"{kind:<40}{figures['faults']:>7}{shown}")
    click.echo()
    for name, count in outcome.verdict.counts.items():
        click.echo(f"{name:<16}{count:>6}  {COUNTS[name]}")
    for line in outcome.verdict.lines():
        click.echo(line)
    refused = {name: count for name, count in outcome.counters.items() if name.startswith(("stale", "refused"))}
    click.echo(f"refused writes and admissions: {refused}")
    click.echo(f"passes that reserved a worker: {outcome.reservations}")


if __name__ == "__main__":
    try:
        main()
    except (PlatformError, SQLAlchemyError) as error:
        sys.exit(f"chaos: {error}")
