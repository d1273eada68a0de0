"""The values of the commands, drawn for people: plain lines, with colours and bars only on a terminal.

This module words the reasons, and `wording` their details. Each function takes a console and a value. Programs read
the value's own `to_json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from celery_capacity.platform.console import held_back
from celery_capacity.platform.console.fitting import cut, fit
from celery_capacity.platform.console.terminal import NOTHING, STATE_STYLES, bar, harmless, moment, table
from celery_capacity.routing.inspect.explanation import Explanation
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
from celery_capacity.routing.model.expected import duration_text
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.policy.labels import labels_text

if TYPE_CHECKING:
    from rich.console import Console

    from celery_capacity.routing.inspect.overview import Overview
    from celery_capacity.routing.inspect.verify import Report
    from celery_capacity.routing.inspect.waiting import BacklogLine
    from celery_capacity.routing.inspect.worker_lines import WorkerLine
    from celery_capacity.routing.recovery.drift import Reconciled
    from celery_capacity.routing.recovery.rebuild import Rebuilt
    from celery_capacity.routing.store.quarantine import Quarantined

#: Unknown tasks that `cluster` names.
SHOWN_TASKS: Final = 5
#: Advice where no worker knows a task, with both ways to name its code.
WITH_ITS_CODE: Final = (
    "Start a worker with its code: name the module in PLATFORM_IMPORTS, or your app by celery -A APP worker."
)
#: Age of a heartbeat in seconds from which a worker is silent, where the caller does not say.
SILENT_AFTER: Final = 15.0
#: Characters of a bar, at least and at most: as many as the screen has beside the other columns. Bars of several
#: resources are narrower.
NARROWEST_BAR: Final = 4
SHORTEST_BAR: Final = 8
LONGEST_BAR: Final = 24


#: Words for the reasons that time does not change.
BLOCKED: Final = {
    Reason.NO_TASK: "no worker knows their task",
    Reason.NO_QUEUE: "no worker serves their queue",
    Reason.NO_LABEL: "no worker has such labels",
    Reason.UNKNOWN_RESOURCE: "no worker has such a resource",
    Reason.TOO_LARGE: "larger than every worker",
}
#: Columns of the backlog that may be narrower than their content on a terminal, with the fewest characters of each.
ELASTIC_BACKLOG: Final = {"request": 20, "queue": 6}


def cluster(console: Console, overview: Overview, silent_after: float = SILENT_AFTER) -> None:
    """Print the totals, a line for each worker, and the backlog by request.

    `silent_after`: age of a heartbeat in seconds from which a worker is shown as silent.
    """
    decides = overview.why.startswith("Postgres decides")
    cold = "from Postgres, which decides" if decides else "from Postgres: the ledger does not answer or is cold"
    source = {Store.LEDGER: "from the ledger", Store.POSTGRES: cold}
    workers = len(overview.live)
    if not workers and overview.is_new:
        console.print("no workers yet")
    else:
        console.print(f"{workers} worker{'s' if workers != 1 else ''}, {source[overview.source]}")
    resources = overview.resources
    totals(console, overview, resources)
    shown, last = overview.shown
    if shown:
        console.print()
        worker_table(console, shown, resources, silent_after)
    if last is not None:
        console.print(f"more: --after {harmless(last)}")
    if overview.backlog:
        console.print()
        _backlog(console, overview.backlog)
    held_back.show(console, overview)
    if overview.memory_short:
        console.print("\nRedis is nearly full: jobs that find no room wait in Postgres", soft_wrap=True)
    if overview.quarantine is not None and overview.quarantine.messages:
        console.print()
        quarantine(console, overview.quarantine)


def quarantine(console: Console, quarantined: Quarantined) -> None:
    """Print how many messages were set aside, and a line for each of the newest reasons."""
    if not quarantined.messages:
        console.print("no message was set aside")
        return
    console.print(f"{quarantined.messages} messages were set aside: nobody could read them. The newest reasons:")
    rows = [
        (entry.reason, cut(entry.detail), entry.queue, str(entry.messages), moment(entry.seen_at))
        for entry in quarantined.reasons
    ]
    table(console, ("reason", "detail", "queue", "messages", "last"), rows, right=(3,))


def totals(console: Console, overview: Overview, resources: Sequence[str]) -> None:
    """Print a line for each resource, on a terminal with a bar, and the size of the backlog."""
    used, total = overview.allocated(CPUS), overview.total(CPUS)
    share, free = f"{overview.utilization_percent:g}%", format_cpus(overview.available(CPUS))
    lines = {
        CPUS: f"{format_cpus(used)} of {format_cpus(total)} allocated ({share}), {free} available",
        MEMORY: f"{_of(overview.allocated(MEMORY), overview.total(MEMORY))} allocated",
        **{name: f"{overview.allocated(name)} of {overview.total(name)} allocated" for name in (SLOTS, *resources)},
    }
    for name, text in lines.items():
        label = f"{'CPUs' if name == CPUS else name:<7} "
        if console.is_terminal:
            meter = _bar(console, overview.allocated(name), overview.total(name), SHORTEST_BAR)
            console.print(Text.assemble(harmless(label), meter, f" {text}"))
        else:
            console.print(label + text)
    console.print(f"backlog {overview.waiting} waiting")


def _backlog(console: Console, backlog: Sequence[BacklogLine]) -> None:
    """Print a line for each request that waits. Jobs that no worker can take come first, with the reason."""
    _unknown_tasks(console, [line.unknown_task for line in backlog if line.unknown_task])
    columns: dict[str, list[str]] = {
        "request": [line.request_text for line in backlog],
        "waiting": [str(line.waiting) for line in backlog],
        "oldest": [age(line.oldest) for line in backlog],
        "queue": [harmless(line.request.queue) for line in backlog],
        "blocked": ["" if line.blocked is None else BLOCKED[line.blocked] for line in backlog],
    }
    if all(line.request.queue == DEFAULT_QUEUE for line in backlog):
        del columns["queue"]
    if all(line.blocked is None for line in backlog):
        del columns["blocked"]
    if console.is_terminal:
        columns = fit(columns, console.width, ELASTIC_BACKLOG, dispensable=())
    rows = [
        [Text(cell, "bold red") if name == "blocked" else cell for name, cell in zip(columns, row, strict=True)]
        for row in zip(*columns.values(), strict=True)
    ]
    table(console, list(columns), rows, right=(1, 2))


def _unknown_tasks(console: Console, names: Sequence[str]) -> None:
    """Say which tasks wait and no live worker knows: each once, and the first few."""
    tasks = list(dict.fromkeys(names))
    for name in tasks[:SHOWN_TASKS]:
        console.print(f"No live worker knows the task {cut(harmless(name))}.", style="red")
    if len(tasks) > SHOWN_TASKS:
        console.print(f"The same holds for {len(tasks) - SHOWN_TASKS} more tasks.", style="red")
    if tasks:
        console.print(WITH_ITS_CODE)


def worker_table(console: Console, workers: Sequence[WorkerLine], resources: Sequence[str], silent: float) -> None:
    """Print a line for each worker, with a column for each resource that not every worker has."""
    names = (CPUS, MEMORY, SLOTS, *resources)
    columns = {
        **dict.fromkeys(("worker", "status", "CPUs", *names[1:], "heartbeat"), True),
        "left": any(worker.left is not None for worker in workers),
        "queues": any(queues_of(worker.capacity) != [DEFAULT_QUEUE] for worker in workers),
        "labels": any(worker.labels for worker in workers),
    }
    header = [name for name, shown in columns.items() if shown]
    rows = [list(compress(_worker(worker, resources, silent), columns.values())) for worker in workers]
    meters = {
        column: [(worker.allocated.get(name, 0), worker.capacity.get(name, 0)) for worker in workers]
        for column, name in enumerate(names, 2)
    }
    shares = {column: pairs for column, pairs in meters.items() if any(total for _, total in pairs)}
    table_with_bars(console, header, rows, shares, right=range(2, 6 + len(resources)))


def table_with_bars(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    meters: Mapping[int, Sequence[tuple[float, float]]],
    right: Sequence[int],
) -> None:
    """Print a table; on a terminal, draw a bar in each row before some columns.

    `meters`: by the number of a column, (used, total) for each row. On a narrow screen only the first has bars.
    """
    if not console.is_terminal or not meters:
        table(console, header, rows, right)
        return
    others = sum(max(map(len, cells)) + 2 for cells in zip(header, *rows, strict=True))
    first = min(meters)
    width = (console.width - others - 2 * (len(meters) - 1)) // len(meters)
    if width < NARROWEST_BAR:
        meters, width = {first: meters[first]}, max(console.width - others, SHORTEST_BAR)
    width = min(width, LONGEST_BAR if len(meters) == 1 else SHORTEST_BAR)
    columns = [[name, *(row[number] for row in rows)] for number, name in enumerate(header)]
    drawn: list[Sequence[str | Text]] = []
    moved: list[int] = []
    for number, cells in enumerate(columns):
        if number in meters:
            drawn.append(["", *(_bar(console, used, total, width) for used, total in meters[number])])
        if number in right:
            moved.append(len(drawn))
        drawn.append(cells)
    names, *lines = zip(*drawn, strict=True)
    table(console, [str(name) for name in names], lines, moved)


def _bar(console: Console, used: float, total: float, width: int) -> Text:
    """Draw an allocation; a full one in another colour."""
    return Text(bar(used, total, width, unicode=_draws(console)), "yellow" if 0 < total <= used else "green")


def _worker(worker: WorkerLine, resources: Sequence[str], silent_after: float) -> tuple[str | Text, ...]:
    total, used = worker.capacity.get(CPUS, 0), worker.allocated.get(CPUS, 0)
    return (
        worker.name,
        Text(worker.status, STATE_STYLES.get(worker.status, "")),
        f"{format_cpus(used)}/{format_cpus(total)}",
        _of(worker.allocated.get(MEMORY, 0), worker.capacity.get(MEMORY, 0)),
        *(_share(worker, name) for name in (SLOTS, *resources)),
        _heartbeat(worker.heartbeat_age, silent_after),
        age(worker.left),
        ", ".join(queues_of(worker.capacity)),
        labels_text(worker.labels).replace(",", ", "),
    )


def _heartbeat(seconds: float | None, silent_after: float) -> str | Text:
    if seconds is None:
        return "unknown"
    return Text(f"silent {age(seconds)}", "bold red") if seconds > silent_after else f"{age(seconds)} ago"


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


def progress(reported: Mapping[str, Any] | None) -> str:
    """Format how far a job has come: "3 of 10 (30%), frames"."""
    if reported is None:
        return ""
    current, total, message = reported["current"], reported["total"], reported["message"]
    of = "" if total is None else f" of {total:,.10g}{f' ({current / total:.0%})' if total else ''}"
    return f"{current:,.10g}{of}{f', {message}' if message else ''}"


def reasons(why: Explanation) -> list[str]:
    """Explain why a job waits, in sentences: the first gives the reason, the others add to it."""
    sentences = [_reason(why)]
    if why.place is not None:
        sentences.append(
            f"It is number {why.place} of the jobs with this request;"
            f" {why.position or 0} {'job' if why.position == 1 else 'jobs'} would start before it."
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
        Reason.NO_WORKER: f"The workers that are large enough admit no jobs now, such as {why.worker}."
        if why.worker
        else "No live worker admits jobs. Start one: celery -A platform worker"
        if why.request.queue == DEFAULT_QUEUE
        else f"No live worker that serves queue {why.request.queue} admits jobs.",
        Reason.NO_TASK: f"No live worker knows its task. {WITH_ITS_CODE}",
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
        Reason.NO_LABEL: f"No worker is as it asks: {why.where}."
        + (f" The workers have {why.labels}." if why.labels else ""),
        Reason.ALONE: ("It asks" if why.exclusive else "One more lost attempt would end it, so it has")
        + " to run alone on a worker, and none that it fits is empty."
        + (f" {why.worker} takes nothing else until it is." if why.worker else ""),
        Reason.NO_TIME: f"No worker that it fits lives long enough: it may run for {duration_text(why.asked or 0)},"
        f" and {why.worker}, which lives longest, has {duration_text(why.free or 0)} left.",
        Reason.RESERVED: held_back.why_reserved(why.worker, why.tenant),
        Reason.BEHIND_SHAPE: "There is room, and jobs with the same request come before it.",
        Reason.ABOUT_TO_START: f"There is room on {why.worker or 'a worker'}: it is about to start.",
        Reason.TENANT_QUOTA: f"Its tenant {why.tenant} has reached its quota of {why.resource}: it needs {asked},"
        f" and {free} is left.",
        Reason.TENANT_SHARE: f"No worker has room now, and tenant {why.tenant}, which is further below its share,"
        " comes first.",
        Reason.PAUSED: held_back.why_paused(why.pause),
        Reason.CORDONED: held_back.why_cordoned(why.cordon, why.worker),
        Reason.SCHEDULED: f"It must not start before {moment(why.due_at)}.",
        Reason.NEEDS_JOBS: f"It waits until {'this job has' if len(why.needs) == 1 else 'these jobs have'} succeeded:"
        f" {', '.join(why.needs)}.",
        Reason.RATE_LIMIT: f"The rate limit of its task is {why.rate}, in the whole cluster, and others come before"
        " it.",
        Reason.KEY_LIMIT: held_back.why_key(why.key),
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
        word_style = {True: "green", False: "bold red", None: ""}[verdict.holds]
        line = Text.assemble(f"{verdict.name} ", (word[verdict.holds], word_style), f": {verdict.says}")
        console.print(line)
        for evidence in verdict.detail:
            console.print(f"   {evidence}")
        if verdict.violations > len(verdict.detail):
            console.print(f"   and {verdict.violations - len(verdict.detail)} more")


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
            f"scheduler state rebuilt: epoch {rebuilt.epoch} was opened with {rebuilt.workers} workers,"
            f" {rebuilt.held} held and {rebuilt.filed} waiting jobs",
        )
    console.print(f"applied   {done.applied} transitions that Postgres did not have")
    console.print(f"compared  {done.checked} jobs")
    console.print(f"drift     {done.drift}, repaired {done.repaired.total()}")
    for kind, number in sorted(done.found.items()):
        console.print(f"          {number} {kind}")
