"""Words for what a waiting job lacks on each worker, and for what would make room for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from celery_capacity.platform.console import render
from celery_capacity.platform.console.estimates import start_sentence
from celery_capacity.routing.inspect.explanation import Explanation, OverQuota
from celery_capacity.routing.model.amounts import CPUS, MEMORY, SLOTS, format_amount, format_cpus, format_memory
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.policy.missing import Missing, Room

#: Running jobs that a sentence names.
SHOWN_JOBS: Final = 5
#: Reasons for which people see a line for each worker. For the others the first sentence says all.
LISTED: Final = frozenset({Reason.NO_ROOM, Reason.ALONE, Reason.NO_WORKER})


class Meaning(NamedTuple):
    """Reason to wait, for a table: what `job` says, what that means, and what a person can do."""

    says: str
    means: str
    remedy: str


#: Each reason to wait. docs/explanation/why-does-it-wait.md has them as a table.
MEANINGS: Final = {
    Reason.NO_WORKER: Meaning(
        "No live worker admits jobs; or: the workers that are large enough admit no jobs now",
        "no worker lives, or all that could take it are draining, silent or closed",
        "start one; where some run, `cluster` shows their status, and their logs say why",
    ),
    Reason.NO_TASK: Meaning(
        "No live worker knows its task",
        "the code of the task is on no worker",
        "start a worker with the code: `PLATFORM_IMPORTS`, or `-A` with your app",
    ),
    Reason.NO_QUEUE: Meaning(
        "No worker serves queue …",
        "the job is in a queue that nobody consumes",
        "start a worker with `-Q` and that queue, or `celery -A platform control add_consumer QUEUE`",
    ),
    Reason.UNKNOWN_RESOURCE: Meaning(
        "No worker publishes …",
        "the job asks for a resource that no worker has",
        "start a worker with `PLATFORM_RESOURCES` or `PLATFORM_GPUS`",
    ),
    Reason.TOO_LARGE: Meaning(
        "It is too large for every worker",
        "no registered worker could hold it, not even an empty one",
        "start a larger worker, or ask for less",
    ),
    Reason.NO_ROOM: Meaning(
        "No worker has room now",
        "a worker that is large enough is full, or is left to a job that must run alone",
        "wait, add workers, ask for less, or give it a higher `priority`",
    ),
    Reason.CORDONED: Meaning(
        "Only … has room for it, which is cordoned",
        "an operator took the worker out; no other worker takes the job now",
        "wait, start another worker, or `celery -A platform uncordon NAME`",
    ),
    Reason.NO_TIME: Meaning(
        "No worker that it fits lives long enough",
        "each worker that is large enough ends before the job would, by its `time_limit` or its `expected` time",
        "start a worker that [lives longer](../how-to/run-times.md#end-a-worker-at-a-known-time), or give the job a"
        " shorter `expected` or `time_limit`",
    ),
    Reason.NO_LABEL: Meaning(
        "No worker is as it asks",
        "no registered worker has the labels, or the name, that `where` or `worker` of the job asks for",
        "start a worker with such [labels](../how-to/labels.md), or ask for others",
    ),
    Reason.RESERVED: Meaning(
        "Only … has room, and it is reserved for a job that comes before it",
        "a [wider job](policy.md#when-does-a-wide-job-get-its-turn) waits for room there, and this one would delay it",
        "nothing: the wider job comes first; a higher `priority` passes it, and so may a short `expected` time",
    ),
    Reason.BEHIND_SHAPE: Meaning(
        "There is room, and jobs with the same request come before it",
        "those start first, at this moment",
        "nothing",
    ),
    Reason.ALONE: Meaning(
        "It asks to run alone on a worker; or: one more lost attempt would end it, so it has to",
        "the job is `exclusive`; or two of its workers died, and the next attempt runs without neighbours",
        "nothing: a worker is kept for it, and empties",
    ),
    Reason.ABOUT_TO_START: Meaning(
        "There is room: it is about to start",
        "it is admitted at this moment, or by the next sweep",
        "nothing; if it stays so for more than 10 s, run `verify`",
    ),
    Reason.TENANT_QUOTA: Meaning(
        "Its tenant … has reached its quota of …",
        "the running jobs of its tenant hold as much of a resource as the tenant may",
        "wait for one of them, or raise the quota: `celery -A platform tenant set` ([how](../how-to/tenants.md))",
    ),
    Reason.TENANT_SHARE: Meaning(
        "No worker has room now, and tenant … comes first",
        "its tenant uses more of the workers beside its weight than another one whose jobs wait",
        "wait, or change the weights: `celery -A platform tenant set` ([how](../how-to/tenants.md))",
    ),
    Reason.PAUSED: Meaning(
        "… is paused since …",
        "an operator paused its queue, its task or everything",
        "wait, or `celery -A platform resume` with the option that it names ([how](../how-to/drain-and-pause.md))",
    ),
    Reason.SCHEDULED: Meaning(
        "It must not start before …",
        "it has a `countdown` or an `eta`, or pauses before a retry",
        "nothing",
    ),
    Reason.NEEDS_JOBS: Meaning(
        "It waits until these jobs have succeeded",
        "the call named them in `after`",
        "look why those wait; it starts, or is cancelled, when they are over",
    ),
    Reason.RATE_LIMIT: Meaning(
        "The rate limit of its task is …",
        "the jobs that started have used up the rate, in the whole cluster",
        "wait, or set another one: `celery -A platform control rate_limit TASK 100/m`",
    ),
    Reason.KEY_LIMIT: Meaning(
        "The limit of its key … is …",
        "as many jobs as it allows hold one of its keys, or have used up the rate of one",
        "wait for an end of those that hold it ([how](../how-to/gates.md#run-at-most-so-many-jobs-of-a-key))",
    ),
    Reason.ON_ITS_WAY: Meaning(
        "It is stored and on its way to the ledger",
        "its sender brings it, or died and the sweep brings it within 10 s",
        "nothing; if it stays: does a worker live, does Redis answer?",
    ),
    Reason.LEDGER_CLOSED: Meaning(
        "The ledger is cold",
        "Redis lost its books, and a live worker rebuilds them in seconds",
        "nothing; if it stays, start a worker",
    ),
    Reason.LEDGER_UNREACHABLE: Meaning(
        "Redis does not answer",
        "nothing is admitted; after some 20 s workers continue from Postgres",
        "look at Redis",
    ),
    Reason.LEDGER_STANDS_BACK: Meaning(
        "Postgres admits instead of the ledger",
        "workers pull from Postgres what fits them, until Redis is back",
        "look at Redis",
    ),
    Reason.REPLACED: Meaning(
        "It was replaced by another task",
        "its replacement carries its id on, and ends it",
        "look at the job that replaced it",
    ),
}


def sentences(why: Explanation) -> list[str]:
    """Explain why a job waits: the reason, its place, what each worker lacks, and when it starts."""
    return [*render.reasons(why), *details(why)]


def details(why: Explanation) -> list[str]:
    """Say what the job lacks on each worker, which running jobs would make room by their ends, and when it starts.

    A single worker is not listed: the first sentence of the explanation names it.
    """
    sentences = []
    if len(why.over_quota) > 1:
        sentences += [over_quota(line) for line in why.over_quota]
    if why.why in LISTED and len(why.missing) > 1:
        sentences += [f"On {line.worker}: {shortage(line)}." for line in why.missing]
        if why.more_missing:
            workers = "worker lacks" if why.more_missing == 1 else "workers lack"
            sentences.append(f"{why.more_missing} more {workers} room too.")
    if why.unblocked_by is not None:
        jobs, worker = why.unblocked_by.jobs, why.unblocked_by.worker
        ends = f"The end of job {jobs[0]}" if len(jobs) == 1 else f"The ends of the jobs {_listed(jobs)}"
        sentences.append(f"{ends} on {worker} would make room for it.")
    if why.estimate is not None:
        sentences.append(start_sentence(why.estimate))
    return sentences


def over_quota(line: OverQuota) -> str:
    """Say what a quota leaves for an alternative of a job."""
    needed, left = (format_amount(line.resource, max(0, amount)) for amount in (line.asked, line.free))
    return f"The alternative of {line.request} needs {needed}, and the quota leaves {left}."


def shortage(line: Missing) -> str:
    """Say what a worker lacks: "8 of 16 CPUs free, memory enough"."""
    if not line.admits:
        return "it admits no jobs now"
    if line.alone:
        return "a job must run alone there"
    short = [_free(room) for room in line.rooms if not room.enough]
    enough = ["CPUs" if room.resource == CPUS else room.resource for room in line.rooms if room.enough]
    enough = [name for name in enough if name != SLOTS]
    return ", ".join([*short, *([f"{' and '.join(enough)} enough"] if enough else [])])


def _free(room: Room) -> str:
    free = max(0, room.free)
    if not room.total:
        return f"no {room.resource}"
    if room.resource == CPUS:
        return f"{format_cpus(free)} of {format_amount(CPUS, room.total)} free"
    if room.resource == MEMORY:
        return f"{format_memory(free)} of {format_memory(room.total)} memory free"
    return f"{free} of {format_amount(room.resource, room.total)} free"


def _listed(jobs: Sequence[str]) -> str:
    shown = list(jobs[:SHOWN_JOBS])
    if len(jobs) > len(shown):
        return f"{', '.join(shown)} and {len(jobs) - len(shown)} more"
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
