"""The values of the commands, drawn for people: plain lines, with colours and bars only on a terminal.

Only this module words the reasons. Each function takes a console and a value. Programs read the value's own `to_json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from celery_capacity.platform.console.terminal import bar, harmless, table
from celery_capacity.routing.inspect.explain import Explanation
from celery_capacity.routing.model.amounts import (
    ALONE,
    CPUS,
    DEFAULT_QUEUE,
    GPUS,
    MEMORY,
    SLOTS,
    format_amount,
    format_cpus,
    format_memory,
    queues_of,
)
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Store

if TYPE_CHECKING:
    from rich.console import Console

    from celery_capacity.routing.inspect.overview import Overview, WorkerLine
    from celery_capacity.routing.inspect.verify import Report
    from celery_capacity.routing.recovery.drift import Reconciled
    from celery_capacity.routing.recovery.rebuild import Rebuilt
    from celery_capacity.routing.store.queries import JobFile, JobLine

#: Characters of an error or a name in a list.
CUT: Final = 60
#: Unknown tasks that `cluster` names.
SHOWN_TASKS: Final = 5
#: Characters of a bar, at least and at most: as many as the screen has beside the other columns.
SHORTEST_BAR: Final = 8
LONGEST_BAR: Final = 24
#: Text in place of a missing value.
NOTHING: Final = "-"


def cluster(console: Console, overview: Overview) -> None:
    """Print the totals, a line for each worker, and the backlog by request."""
    decides = overview.why.startswith("Postgres decides")
    cold = "from Postgres, which decides" if decides else "from Postgres: the ledger does not answer or is cold"
    source = {Store.LEDGER: "from the ledger", Store.POSTGRES: cold}
    workers = len(overview.workers)
    console.print(f"{workers} worker{'s' if workers != 1 else ''}, {source[overview.source]}", soft_wrap=True)
    total, used, free = overview.total(CPUS), overview.allocated(CPUS), overview.available(CPUS)
    console.print(
        f"CPUs    {format_cpus(used)} of {format_cpus(total)} allocated ({overview.utilization_percent:g}%),"
        f" {format_cpus(free)} available",
        soft_wrap=True,
    )
    console.print(f"memory  {_of(overview.allocated(MEMORY), overview.total(MEMORY))} allocated", soft_wrap=True)
    console.print(f"slots   {overview.allocated(SLOTS)} of {overview.total(SLOTS)} allocated", soft_wrap=True)
    resources = overview.resources
    for name in resources:
        console.print(f"{name:<7} {overview.allocated(name)} of {overview.total(name)} allocated", soft_wrap=True)
    console.print(f"backlog {overview.waiting} waiting", soft_wrap=True)
    if overview.workers:
        console.print()
        _workers(console, overview.workers, resources)
    if overview.backlog:
        console.print()
        _unknown_tasks(console, [line.unknown_task for line in overview.backlog if line.unknown_task])
        rows = [
            (str(line.request), str(line.waiting), age(line.oldest), line.request.queue) for line in overview.backlog
        ]
        header = ("request", "waiting", "oldest", "queue")
        shown = len(header) - all(row[-1] == DEFAULT_QUEUE for row in rows)
        table(console, header[:shown], [row[:shown] for row in rows], right=(1, 2))
    if overview.quarantine is not None and overview.quarantine.messages:
        console.print()
        console.print(
            f"{overview.quarantine.messages} messages were set aside: nobody could read them. The newest reasons:",
            soft_wrap=True,
        )
        aside = [
            (_cut(entry.reason), entry.queue, str(entry.messages), moment(entry.seen_at))
            for entry in overview.quarantine.reasons
        ]
        table(console, ("reason", "queue", "messages", "last"), aside, right=(2,))


def _unknown_tasks(console: Console, names: Sequence[str]) -> None:
    """Say which tasks wait and no live worker knows: each once, and the first few."""
    tasks = list(dict.fromkeys(names))
    for name in tasks[:SHOWN_TASKS]:
        text = f"No live worker knows the task {_cut(harmless(name))}: start one with its code."
        console.print(text, style="red", soft_wrap=True)
    if len(tasks) > SHOWN_TASKS:
        console.print(f"The same holds for {len(tasks) - SHOWN_TASKS} more tasks.", style="red", soft_wrap=True)


def _workers(console: Console, workers: Sequence[WorkerLine], resources: Sequence[str]) -> None:
    """Print a line for each worker, with a column for each resource that not every worker has."""
    header = ("worker", "status", "CPUs", "memory", "slots", *resources, "heartbeat", "queues")
    rows = [_worker(worker, resources) for worker in workers]
    shown = len(header) - all(row[-1] == DEFAULT_QUEUE for row in rows)
    header, rows = header[:shown], [row[:shown] for row in rows]
    meters = [(worker.allocated.get(CPUS, 0), worker.capacity.get(CPUS, 0)) for worker in workers]
    table_with_bars(console, header, rows, meters, column=2, right=range(2, 6 + len(resources)))


def table_with_bars(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    meters: Sequence[tuple[float, float]],
    column: int,
    right: Sequence[int],
) -> None:
    """Print a table; on a terminal, draw a bar in each row before the column with this number.

    `meters` has (used, total) for each row.
    """
    if not console.is_terminal:
        table(console, header, rows, right)
        return
    others = sum(max(map(len, cells)) + 2 for cells in zip(header, *rows, strict=True))
    width = min(max(console.width - others, SHORTEST_BAR), LONGEST_BAR)
    drawn = [
        (*row[:column], bar(used, total, width, unicode=_draws(console)), *row[column:])
        for row, (used, total) in zip(rows, meters, strict=True)
    ]
    moved = [number + (number >= column) for number in right]
    table(console, (*header[:column], "", *header[column:]), drawn, moved)


def _worker(worker: WorkerLine, resources: Sequence[str]) -> tuple[str, ...]:
    total, used = worker.capacity.get(CPUS, 0), worker.allocated.get(CPUS, 0)
    return (
        worker.name,
        worker.status,
        f"{format_cpus(used)}/{format_cpus(total)}",
        _of(worker.allocated.get(MEMORY, 0), worker.capacity.get(MEMORY, 0)),
        *(_share(worker, name) for name in (SLOTS, *resources)),
        "unknown" if worker.heartbeat_age is None else f"{age(worker.heartbeat_age)} ago",
        ", ".join(queues_of(worker.capacity)),
    )


def _share(worker: WorkerLine, name: str) -> str:
    """Format the allocated pieces of a resource; a worker that neither has nor holds any has none to show."""
    total, used = worker.capacity.get(name, 0), worker.allocated.get(name, 0)
    return f"{used}/{total}" if total or used or name == SLOTS else NOTHING


def _of(used: int, total: int) -> str:
    return f"{format_memory(used)} of {format_memory(total)}"


def _draws(console: Console) -> bool:
    """Return True if the console can show block characters."""
    return (console.encoding or "").lower().startswith("utf")


def age(seconds: float | None) -> str:
    """Format seconds as people say them: "4 s", "3 min", "5 h", "2 d"."""
    if seconds is None:
        return NOTHING
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def jobs(console: Console, lines: Sequence[JobLine], total: int) -> None:
    """Print the list of jobs, newest first."""
    if not lines:
        console.print("no jobs", soft_wrap=True)
        return
    rows = [
        (
            line["id"],
            line["name"],
            line["state"],
            line["worker"] or NOTHING,
            str(line["attempt"]),
            str(line["priority"]),
            str(Request.from_people(line["request"])),
            moment(line["submitted_at"]),
            _cut(line["error"] or ""),
        )
        for line in lines
    ]
    header = ("id", "task", "state", "worker", "attempt", "priority", "request", "submitted", "error")
    table(console, header, rows, right=(4, 5))
    if total > len(lines):
        console.print(f"the newest {len(lines)} of {total}; more with --limit", soft_wrap=True)


def job(console: Console, file: JobFile, why: Explanation | None) -> None:
    """Print one job: its description, its times, its attempts, and why it waits."""
    line = file.job
    declared = "" if line["declared"] else " (the default: no worker declared this task)"
    rows = [
        ("id", line["id"]),
        ("task", line["name"]),
        ("state", line["state"]),
        ("request", f"{Request.from_people(line['request'])}{declared}"),
        ("queue", "" if line["queue"] == DEFAULT_QUEUE else line["queue"]),
        ("priority", str(line["priority"])),
        ("worker", line["worker"] or NOTHING),
        ("submitted", moment(line["submitted_at"])),
        ("due", moment(line["due_at"])),
        ("expires", moment(line["expires_at"])),
        ("admitted", _after(line["admitted_at"], line["submitted_at"])),
        ("started", _after(line["started_at"], line["admitted_at"])),
        ("finished", _after(line["finished_at"], line["started_at"])),
        ("error", line["error"] or ""),
    ]
    for name, value in rows:
        if value not in ("", NOTHING) or name == "worker":
            console.print(f"{name:<10}{value}", soft_wrap=True)
    if why is not None and why.waits:
        console.print()
        for number, sentence in enumerate(reasons(why)):
            console.print(f"{'waits:' if number == 0 else '':<10}{sentence}", soft_wrap=True)
    if file.attempts:
        console.print()
        table(
            console,
            ("attempt", "worker", "admitted", "started", "ended", "outcome", "error"),
            _attempts(file),
        )


def _attempts(file: JobFile) -> list[tuple[str, ...]]:
    return [
        (
            f"{attempt['epoch']}.{attempt['attempt']}",
            attempt["worker"],
            moment(attempt["admitted_at"]),
            moment(attempt["started_at"]),
            moment(attempt["ended_at"]),
            attempt["outcome"] or "open",
            _cut(attempt["error"] or ""),
        )
        for attempt in file.attempts
    ]


def reasons(why: Explanation) -> list[str]:
    """Explain why a job waits, in sentences: the first gives the reason, the others add to it."""
    sentences = [_reason(why)]
    if why.place is not None:
        sentences.append(
            f"It is number {why.place} of the jobs with this request; {why.before or 0} waiting jobs come before it."
        )
    if why.large_enough is not None and why.why in (Reason.NO_ROOM, Reason.BEHIND_SHAPE):
        sentences.append(f"{why.large_enough} of {why.live_workers} live workers are large enough for it.")
    if not why.declared:
        sentences.append(
            "No worker has declared this task, so its request is the default;"
            " a worker that knows the task may declare another."
        )
    return sentences


def _reason(why: Explanation) -> str:
    asked = _amount(why.resource, why.asked)
    free = _amount(why.resource, max(0, why.free or 0))
    sentences = {
        Reason.NO_WORKER: "No live worker admits jobs. Start one: celery -A platform worker"
        if why.request.queue == DEFAULT_QUEUE
        else f"No live worker that serves queue {why.request.queue} admits jobs.",
        Reason.NO_TASK: "No live worker knows its task. Start one with the code that has it: PLATFORM_IMPORTS, or -A"
        " with your app.",
        Reason.NO_QUEUE: f"No worker serves queue {why.request.queue}."
        f" Start one: celery -A platform worker -Q {why.request.queue}",
        Reason.UNKNOWN_RESOURCE: f"No worker publishes {why.resource}, and it needs {asked}."
        f" A worker publishes {'them' if why.resource == GPUS else 'it'} through"
        f" {'PLATFORM_GPUS' if why.resource == GPUS else 'PLATFORM_RESOURCES'}.",
        Reason.TOO_LARGE: f"It is too large for every worker: it needs {asked},"
        f" and {why.worker}, which comes closest, has {free} when empty.",
        Reason.NO_ROOM: f"No worker has room now: {why.worker} is left to a job that must run alone."
        if why.resource == ALONE
        else f"No worker has room now: it needs {asked}, and {why.worker}, which comes closest, has {free} free.",
        Reason.ALONE: "One more lost attempt would end it, so it runs alone on a worker, and none that it fits is"
        " empty." + (f" {why.worker} takes nothing else until it is." if why.worker else ""),
        Reason.BEHIND_SHAPE: "There is room, and jobs with the same request come before it.",
        Reason.ABOUT_TO_START: f"There is room on {why.worker or 'a worker'}: it is about to start.",
        Reason.SCHEDULED: f"It must not start before {moment(why.due_at)}.",
        Reason.NEEDS_JOBS: f"It waits until {'this job has' if len(why.needs) == 1 else 'these jobs have'} succeeded:"
        f" {', '.join(why.needs)}.",
        Reason.RATE_LIMIT: f"The rate limit of its task is {why.rate}, in the whole cluster, and others come before"
        " it.",
        Reason.ON_ITS_WAY: "It is stored and on its way to the ledger; a sweep brings what a sender left.",
        Reason.LEDGER_CLOSED: "The ledger is cold: nothing is admitted until its books are rebuilt.",
        Reason.LEDGER_UNREACHABLE: "Redis does not answer, so nothing is admitted.",
        Reason.LEDGER_STANDS_BACK: "Postgres admits instead of the ledger: workers pull what fits them.",
        Reason.REPLACED: "It was replaced by another task, whose end will be its end.",
        Reason.RUNS: f"It does not wait: it is {why.state.value} on {why.worker}.",
        Reason.ENDED: f"It does not wait: it is {why.state.value}.",
    }
    return sentences[why.why]


def _amount(resource: str | None, amount: int | None) -> str:
    return "" if resource is None or amount is None else format_amount(resource, amount)


def invariants(console: Console, report: Report) -> None:
    """Print a line for each invariant, and its violations."""
    for verdict in report.verdicts:
        word = {True: "holds", False: "VIOLATED", None: "not judged: it holds only at rest, and work runs"}
        console.print(f"{verdict.name} {word[verdict.holds]}: {verdict.says}", soft_wrap=True)
        for line in verdict.detail:
            console.print(f"   {line}", soft_wrap=True)
        if verdict.violations > len(verdict.detail):
            console.print(f"   and {verdict.violations - len(verdict.detail)} more", soft_wrap=True)


def verdict_line(report: Report) -> str:
    """Summarise all invariants in one line."""
    broken = [v.name for v in report.verdicts if v.holds is False]
    if broken:
        return f"invariants: VIOLATED {', '.join(broken)}"
    kept = ", ".join(v.name for v in report.verdicts if v.holds)
    waived = ", ".join(v.name for v in report.verdicts if v.holds is None)
    return f"invariants: {kept} hold" + (f"; {waived} hold only at rest, and work runs" if waived else ", at rest")


def reconciled(console: Console, done: Reconciled, rebuilt: Rebuilt | None) -> None:
    """Print the result of a pass: applied entries, compared jobs, and differences."""
    if rebuilt is not None:
        console.print(
            f"the ledger was cold: epoch {rebuilt.epoch} was opened with {rebuilt.workers} workers,"
            f" {rebuilt.held} held and {rebuilt.filed} waiting jobs",
            soft_wrap=True,
        )
    console.print(f"applied   {done.applied} transitions that Postgres did not have", soft_wrap=True)
    console.print(f"compared  {done.checked} jobs", soft_wrap=True)
    console.print(f"drift     {done.drift}, repaired {done.repaired.total()}", soft_wrap=True)
    for kind, number in sorted(done.found.items()):
        console.print(f"          {number} {kind}", soft_wrap=True)


def moment(value: Any) -> str:
    """Format a time as people read it, in their own zone, to the second."""
    if not isinstance(value, datetime):
        return NOTHING
    return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _after(value: Any, before: Any) -> str:
    """Format a time, and its distance from the step before it."""
    if not isinstance(value, datetime):
        return NOTHING
    if not isinstance(before, datetime):
        return moment(value)
    return f"{moment(value)} (+{max(0.0, (value - before).total_seconds()):.3f} s)"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CUT else line[: CUT - 1] + "…"
