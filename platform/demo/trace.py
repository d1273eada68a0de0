"""A job trace: the submission time, run time and CPUs of each job. No process, store or clock here.

A trace is CSV text with a header that names `submit`, `run` (seconds) and `cpus`. A column `task`, or else `user`, says
which jobs are alike, and a column `tenant` whose they are. Other columns, blank lines and lines that begin with `#` are
ignored. `read` refuses an unreadable row with its line number and value. The tasks of a replay write their measurements
as `Record`s. `summarise` and `peaks` turn these into the numbers of the report.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.amounts import format_cpus, parse_cpus_text
from celery_capacity.routing.model.identifiers import check_tenant

#: Columns that a trace must have, in any order and at any place.
COLUMNS = ("submit", "run", "cpus")

#: Columns of which the first one that is there groups jobs with like run times.
GROUPS = ("task", "user")

#: Column with the tenant of each job.
TENANT = "tenant"

#: Seconds: the shortest sleep of a replayed job, so that a job of one second leaves a mark at any scale.
LEAST_SLEEP = 0.05

#: Seconds: the aimed duration of a replay without `--scale`, without the start and end of its processes.
AIM = 50.0

#: Seconds: the largest time in a trace, 30,000 years. A larger time is a mistake, and sleep() refuses it.
LARGEST_TIME = 1e12

#: Trace of 300 jobs from the KTH-SP2 log. Its head acknowledges the source.
PACKAGED = Path(__file__).with_name("traces") / "kth-sp2-300.csv"

_DECIMAL = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Job:
    """A row of a trace: `row` counts from 0, times are in seconds, `cpus` in millicores.

    `task`: the group of jobs with like run times, "" where the trace names none. `tenant`: "" for none.
    """

    row: int
    submit: float
    run: float
    cpus: int
    line: int
    task: str = field(default="", compare=False)
    tenant: str = field(default="", compare=False)


@dataclass(frozen=True)
class Planned:
    """A job of a replay: submitted `at` seconds after the start, it sleeps `seconds`."""

    job: Job
    at: float
    seconds: float


@dataclass(frozen=True)
class Record:
    """A task's record of its own run: start and end in seconds since the epoch, and its worker."""

    job: int
    start: float
    end: float
    worker: str


@dataclass(frozen=True)
class Summary:
    """Measurements of a replay, in seconds. A job waits from its submission to the start of its task."""

    makespan: float
    wait_mean: float
    wait_p95: float
    wait_max: float


def decimal(text: str) -> float | None:
    """Return the finite number ≥ 0 that the text writes in plain decimal notation, or None."""
    text = text.strip()
    if not _DECIMAL.fullmatch(text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def parse_scale(text: str) -> float:
    """Parse how many times faster than the trace a replay is. Raise InvalidRequest unless it is a decimal above 0."""
    number = decimal(text)
    if number is None or number <= 0:
        raise InvalidRequest(
            f"--scale is not a decimal number above 0: {text!r}",
            value=text,
            advice="Give how many times faster the trace is replayed, such as 10000 or 0.5.",
        )
    return number


class _Numbered:
    """Lines of a trace without comments. `line` is the number of the last line that was read, from 1."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.line = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._lines:
            self.line += 1
            if self.line == 1:
                text = text.removeprefix("\ufeff")
            # The csv module of Python 3.11 and that of 3.12 treat NUL differently: here it is a wrong value.
            if text.strip() and not text.lstrip().startswith("#"):
                yield text.replace("\0", "\N{SYMBOL FOR NULL}")


def read(lines: Iterable[str]) -> list[Job]:
    """Return the jobs of a trace in the order of its rows. Raise InvalidRequest with the line and the value."""
    numbered = _Numbered(lines)
    # strict: otherwise an open quote would silently swallow the rows up to the next quote.
    rows = csv.reader(numbered, strict=True)
    jobs: list[Job] = []
    try:
        header = next(rows, None)
        if header is None:
            raise InvalidRequest(
                "the trace is empty", value="", advice="Its first line must name the columns submit,run,cpus."
            )
        columns = _column_numbers([name.strip() for name in header], numbered.line)
        for cells in rows:
            jobs.append(_job(len(jobs), cells, columns, numbered.line))
    except csv.Error as error:
        raise InvalidRequest(
            f"line {numbered.line} of the trace is not CSV: {error}",
            value=None,
            advice="Use commas and plain quotes.",
        ) from error
    if not jobs:
        raise InvalidRequest(
            "the trace has no jobs", value="", advice="Put one job per line below the header submit,run,cpus."
        )
    return jobs


def _column_numbers(header: Sequence[str], line: int) -> dict[str, int]:
    wrong = [name for name in COLUMNS if header.count(name) != 1]
    if wrong:
        raise InvalidRequest(
            f"line {line} of the trace must name {', '.join(COLUMNS)} once each; wrong: {', '.join(wrong)}",
            value=",".join(header),
            advice="Other columns may stand between them.",
        )
    optional = [*[name for name in GROUPS if name in header][:1], *(name for name in (TENANT,) if name in header)]
    return {name: header.index(name) for name in (*COLUMNS, *optional)}


def _job(row: int, cells: Sequence[str], columns: Mapping[str, int], line: int) -> Job:
    def cell(name: str) -> str:
        if columns[name] >= len(cells):
            raise InvalidRequest(
                f"line {line} of the trace has no value for {name}: {','.join(cells)!r}",
                value=",".join(cells),
                advice="Each row needs submit, run and cpus.",
            )
        return cells[columns[name]]

    def seconds(name: str) -> float:
        number = decimal(cell(name))
        if number is None or number > LARGEST_TIME:
            raise InvalidRequest(
                f"line {line} of the trace: {name} is not a number of seconds: {cell(name)!r}",
                value=cell(name),
                advice=f"Give a decimal number from 0 to {LARGEST_TIME:.0f}.",
            )
        return number

    cpus = parse_cpus_text(cell("cpus"), f"line {line} of the trace: cpus")
    task = next((cells[columns[name]].strip() for name in GROUPS if columns.get(name, len(cells)) < len(cells)), "")
    tenant = cells[columns[TENANT]].strip() if columns.get(TENANT, len(cells)) < len(cells) else ""
    if tenant:
        check_tenant(tenant, f"line {line} of the trace: tenant")
    return Job(row, seconds("submit"), seconds("run"), cpus, line, task, tenant)


def too_wide(jobs: Iterable[Job], workers: Mapping[str, int]) -> InvalidRequest | None:
    """Return the error for the widest job if no worker (name → millicores) can ever run it, or None."""
    most = max(workers.values())
    widest = max(jobs, key=lambda job: (job.cpus, -job.row))
    if widest.cpus <= most:
        return None
    need = format_cpus(widest.cpus)
    return InvalidRequest(
        f"job {widest.row} (line {widest.line} of the trace) needs {need} CPUs and no worker has more than "
        f"{format_cpus(most)}",
        value=need,
        advice=f"Give one of the workers at least {need} CPUs: --worker NAME={need}",
    )


def default_scale(jobs: Sequence[Job], cpus: int) -> float:
    """Return the scale, in one significant digit, at which the trace takes about a minute on `cpus` millicores.

    A replay is never shorter than its last end without waiting, nor than its CPU-seconds divided by the CPUs. A trace
    that takes less time than the aim is replayed at its own speed, and never slower.
    """
    first = min(job.submit for job in jobs)
    unhindered = max(job.submit - first + job.run for job in jobs)
    packed = sum(job.run * job.cpus for job in jobs) / cpus if cpus else 0.0
    ratio = max(unhindered, packed) / AIM
    if ratio <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(ratio))
    return round(ratio / power) * power


def plan(jobs: Iterable[Job], scale: float) -> list[Planned]:
    """Plan the replay in order of submission, `scale` times faster. Time starts with the first submission."""
    ordered = sorted(jobs, key=lambda job: (job.submit, job.row))
    first = ordered[0].submit
    return [Planned(job, (job.submit - first) / scale, max(job.run / scale, LEAST_SLEEP)) for job in ordered]


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1]


def summarise(records: Sequence[Record], submitted: Mapping[int, float]) -> Summary:
    """Return the report's numbers. `submitted` has the epoch second at which each job's submission began.

    The clocks of two processes may differ by less than a job needs to arrive. A wait below 0 therefore counts as 0.
    """
    if not records:
        return Summary(0.0, 0.0, 0.0, 0.0)
    waits = [max(record.start - submitted[record.job], 0.0) for record in records]
    return Summary(
        makespan=max(record.end for record in records) - min(submitted.values()),
        wait_mean=sum(waits) / len(waits),
        wait_p95=percentile(waits, 95),
        wait_max=max(waits),
    )


def peaks(records: Iterable[Record], cpus: Mapping[int, int]) -> dict[str, int]:
    """Return the most millicores that ran at once on each worker, by the starts and ends that the tasks recorded.

    A job holds its CPUs in [start, end): a job that starts at the very end of another does not add to it.
    """
    edges = sorted(
        edge
        for record in records
        for edge in (
            (record.start, 1, record.worker, cpus[record.job]),
            (record.end, 0, record.worker, -cpus[record.job]),
        )
    )
    running, most = Counter[str](), dict[str, int]()
    for _, _, worker, change in edges:
        running[worker] += change
        most[worker] = max(most.get(worker, 0), running[worker])
    return most


def averages(records: Sequence[Record], cpus: Mapping[int, int], makespan: float) -> dict[str, int]:
    """Return the millicores that ran on each worker on average, over the makespan in seconds."""
    busy = defaultdict[str, float](float)
    for record in records:
        busy[record.worker] += cpus[record.job] * (record.end - record.start)
    return {worker: round(amount / makespan) for worker, amount in busy.items() if makespan > 0}


def doubled(records: Iterable[Record]) -> list[int]:
    """Return, in order, the jobs that more than one task ran to its end."""
    return sorted(job for job, times in Counter(record.job for record in records).items() if times > 1)


def log_rows(records: Iterable[Record], first: float) -> Iterator[tuple[int, str, str, str]]:
    """Yield the rows job, start, end, worker in order of the start. Times are seconds since `first`, to 1 µs."""
    for record in sorted(records, key=lambda record: (record.start, record.job)):
        yield record.job, f"{record.start - first:.6f}", f"{record.end - first:.6f}", record.worker
