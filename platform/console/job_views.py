"""Jobs drawn for people: the list, which fits the terminal, and one job with all that happened to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from celery_capacity.platform.console.fitting import cut, fit, shorten_end
from celery_capacity.platform.console.render import age, progress, reasons
from celery_capacity.platform.console.terminal import NOTHING, STATE_STYLES, harmless, moment, table
from celery_capacity.platform.console.wording import details
from celery_capacity.routing.config.redaction import hidden_text
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE
from celery_capacity.routing.model.expected import duration_text
from celery_capacity.routing.model.request import Request, alternatives_text
from celery_capacity.routing.model.states import FINAL, State

if TYPE_CHECKING:
    from rich.console import Console

    from celery_capacity.routing.inspect.explanation import Explanation
    from celery_capacity.routing.inspect.job_list import JobList
    from celery_capacity.routing.store.quarantine import Quarantined
    from celery_capacity.routing.store.queries import JobFile

#: Characters of an id in a list on a terminal, and of an id that is shown whole.
SHORT_ID: Final = 8
WHOLE_ID: Final = 12
#: Characters of arguments or of a result.
SHOWN_VALUE: Final = 300


def jobs(console: Console, listed: JobList, total: int | None) -> None:
    """Print a list of jobs. `total`: the number of jobs that were asked for, None if more may be there.

    On a terminal the ids are short, and names are shortened until a row fits. Elsewhere all texts are whole.
    """
    if not listed.lines:
        console.print("no jobs")
        return
    screen = console.width if console.is_terminal else None
    ids = [str(line["id"]) for line in listed.lines]
    short = short_ids(ids) if screen is not None else ids
    columns: dict[str, list[str]] = {
        "id": short,
        "task": [harmless(line["name"]) for line in listed.lines],
        "state": [line["state"] for line in listed.lines],
        **{name: [] for name in ("age", "waited", "ran")},
        "worker": [NOTHING if _waits(line.columns) else harmless(line["worker"] or NOTHING) for line in listed.lines],
        "queue": [harmless(line["queue"]) for line in listed.lines],
        "request": [str(Request.from_people(line["request"])) for line in listed.lines],
        "error": [cut(harmless(line["error"] or "")) for line in listed.lines],
    }
    for line in listed.lines:
        for name, seconds in spans(line.columns, listed.now).items():
            columns[name].append(age(seconds))
    for name, usual in (("queue", DEFAULT_QUEUE), ("error", "")):
        if all(cell == usual for cell in columns[name]):
            del columns[name]
    if screen is not None:
        columns = fit(columns, screen)
    rows = painted(columns, "state")
    header = list(columns)
    table(console, header, rows, right=[header.index(name) for name in ("age", "waited", "ran")])
    if total is None:
        console.print(f"the newest {len(ids)}; more with --limit")
    elif total > len(ids):
        console.print(f"the newest {len(ids)} of {total}; more with --limit")


def set_aside(console: Console, listed: JobList, quarantined: Quarantined) -> None:
    """Name the reasons for which messages were set aside since the oldest of these jobs: a missing job may be there."""
    entries = quarantined.reasons
    if listed.lines:
        entries = tuple(entry for entry in entries if entry.seen_at >= listed.lines[-1]["submitted_at"])
    if entries:
        words = ", ".join(dict.fromkeys(entry.reason for entry in entries))
        console.print(f"messages were set aside meanwhile: {words}; more with --set-aside")


def painted(columns: Mapping[str, Sequence[str]], name: str) -> list[list[str | Text]]:
    """Return the rows of a table, with the words of the column `name` in the colours of their states."""
    column = list(columns).index(name)
    rows: list[list[str | Text]] = [list(row) for row in zip(*columns.values(), strict=True)]
    for row in rows:
        row[column] = Text(str(row[column]), STATE_STYLES.get(str(row[column]), ""))
    return rows


def spans(job: Mapping[str, Any], now: datetime) -> dict[str, float | None]:
    """Return the seconds since a job was submitted, that it waited, and that its newest attempt ran."""
    waits = _waits(job)
    begin = max(filter(None, (job["submitted_at"], job["due_at"])))
    end = now if waits else job["admitted_at"] or job["finished_at"]
    started = None if waits else job["started_at"]
    ended = job["finished_at"] or now
    return {
        "age": _seconds(job["submitted_at"], now),
        "waited": None if job["state"] == State.SCHEDULED else _seconds(begin, end),
        "ran": None if job["state"] == State.REPLACED else _seconds(started, ended),
    }


def _waits(job: Mapping[str, Any]) -> bool:
    """Return whether no worker holds the job. After a hand-back its row still names the worker before."""
    return job["state"] in (State.ACCEPTED, State.WAITING, State.SCHEDULED)


def _seconds(begin: datetime | None, end: datetime | None) -> float | None:
    return None if begin is None or end is None else max(0.0, (end - begin).total_seconds())


def short_ids(ids: Sequence[str]) -> list[str]:
    """Return the beginning of each id: long enough to tell the ids of this list apart. Short ids stay whole."""
    for length in range(SHORT_ID, max(map(len, ids), default=0)):
        short = [job if len(job) <= WHOLE_ID else job[:length].rstrip("-") for job in ids]
        if len(set(short)) == len(set(ids)):
            return short
    return list(ids)


def job(console: Console, file: JobFile, why: Explanation | None, call: Mapping[str, str | None]) -> None:
    """Print one job: its description, what happened in its order, why it waits, and its error at last.

    `call`: the texts of its arguments, its sender and its result.
    """
    line = file.job
    declared = "" if line["declared"] else " (the default: no worker declared this task)"
    waits = why is not None and why.waits
    rows = [
        ("id", line["id"]),
        ("task", line["name"]),
        ("state", Text(line["state"], STATE_STYLES.get(line["state"], ""))),
        ("args", value(call.get("args"))),
        ("kwargs", value(call.get("kwargs"))),
        ("request", f"{alternatives_text(file.alternatives or (Request.from_people(line['request']),))}{declared}"),
        ("expected", duration_text(line["expected_ms"]) if line["expected_ms"] else ""),
        ("queue", "" if line["queue"] == DEFAULT_QUEUE else line["queue"]),
        ("priority", str(line["priority"])),
        ("sender", call.get("sender") or ""),
        ("worker", "" if waits else line["worker"] or ""),
        *_times(file),
        ("progress", progress(line["progress"])),
        ("retry of", line["retry_of"] or ""),
        ("retried", f"as {', '.join(line['retried_as'])}" if line["retried_as"] else ""),
        ("result", value(call.get("result"))),
    ]
    for name, text in rows:
        if text:
            console.print(Text.assemble(f"{name:<10}", text if isinstance(text, Text) else harmless(text)))
    if why is not None and waits:
        console.print()
        for number, sentence in enumerate([*reasons(why), *details(why)]):
            label = ("waits:    ", "bold yellow") if number == 0 else " " * 10
            console.print(Text.assemble(label, harmless(sentence)))
    if file.attempts:
        console.print()
        _attempts(console, file)
    if line["error"]:
        console.print()
        console.print(Text("error", "bold red"))
        console.print("\n".join(f"    {text}" for text in line["error"].splitlines()))


def _times(file: JobFile) -> list[tuple[str, str]]:
    """Return what happened to the job, in order, without the times of an attempt that ended before the job did."""
    line = file.job
    admitted, started = (None, None) if _waits(line.columns) else (line["admitted_at"], line["started_at"])
    before = started or admitted or line["submitted_at"]
    return [
        ("submitted", moment(line["submitted_at"])),
        ("due", moment(line["due_at"]) if line["due_at"] else ""),
        ("expires", moment(line["expires_at"]) if line["expires_at"] and line["state"] not in FINAL else ""),
        ("admitted", _after(admitted, line["submitted_at"])),
        ("started", _after(started, admitted)),
        ("finished", _after(line["finished_at"], before)),
    ]


def _attempts(console: Console, file: JobFile) -> None:
    several = len({attempt["epoch"] for attempt in file.attempts}) > 1 and len(
        {attempt["attempt"] for attempt in file.attempts}
    ) < len(file.attempts)
    columns: dict[str, list[str]] = {
        "attempt": [str(number if several else attempt["attempt"]) for number, attempt in enumerate(file.attempts, 1)],
        "worker": [attempt["worker"] for attempt in file.attempts],
        "admitted": [moment(attempt["admitted_at"]) for attempt in file.attempts],
        "ran": [age(_seconds(attempt["started_at"], attempt["ended_at"] or file.now)) for attempt in file.attempts],
        "outcome": [attempt["outcome"] or "open" for attempt in file.attempts],
        "error": [cut(attempt["error"] or "") for attempt in file.attempts],
    }
    if not any(columns["error"]):
        del columns["error"]
    if console.is_terminal:
        columns = fit(columns, console.width)
    rows = painted(columns, "outcome")
    table(console, list(columns), rows, right=(0, 3))


def value(text: str | None) -> str:
    """Return the text of a value for a line of the screen: secrets hidden, control characters escaped, shortened."""
    if text is None:
        return ""
    return shorten_end(hidden_text(" ".join(text.split())), SHOWN_VALUE)


def _after(time: Any, before: Any) -> str:
    """Format a time, and its distance from the step before it; "" where it did not happen."""
    if not isinstance(time, datetime):
        return ""
    if not isinstance(before, datetime):
        return moment(time)
    return f"{moment(time)} (+{max(0.0, (time - before).total_seconds()):.3f} s)"
