"""`celery -A platform jobs`: the list of jobs, newest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_capacity.platform.console.command import Command, WrongUsage, json_option, stores_of
from celery_capacity.platform.console.durations import Since
from celery_capacity.platform.console.names import complete_task, complete_worker
from celery_capacity.platform.console.terminal import print_json
from celery_capacity.platform.console.text_type import Text
from celery_capacity.platform.console.watch import show, watch_option
from celery_capacity.routing.model.states import State

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy import Engine

    from celery_capacity.routing.inspect.job_list import JobFilter

#: States of `--failed`.
FAILED = (State.FAILED, State.LOST)


@click.command(
    "jobs",
    cls=Command,
    examples=(
        ("The newest 50", "celery -A platform jobs"),
        ("What failed in the last hour", "celery -A platform jobs --failed --since 1h"),
        ("How many jobs of some tasks wait", "celery -A platform jobs --state waiting --task 'video.*' --count"),
        (
            "The jobs of a group, again every 2 s",
            "celery -A platform jobs --group nightly-render --watch",
        ),
        ("What waits, for a program", "celery -A platform jobs --state waiting --json"),
        ("Messages of which no job was made", "celery -A platform jobs --set-aside"),
    ),
)
@click.option(
    "--state",
    "states",
    metavar="STATE",
    type=click.Choice([state.value for state in State]),
    multiple=True,
    help="Only jobs in this state; again for more states.",
)
@click.option("--failed", is_flag=True, help="Only jobs that failed or were lost.")
@click.option(
    "--task", metavar="NAME", type=Text(), shell_complete=complete_task, help="Only jobs of this task; * is any text."
)
@click.option(
    "--worker",
    metavar="NAME",
    type=Text(),
    shell_complete=complete_worker,
    help="Only jobs whose newest attempt is there; * is any text.",
)
@click.option("--queue", metavar="NAME", type=Text(), help="Only jobs of this queue; * is any text.")
@click.option("--group", metavar="ID", type=Text(), help="Only jobs of this group, chord or workflow.")
@click.option("--since", metavar="TIME", type=Since(), help="Only jobs submitted since then: 15min, 1h, 2d, or a time.")
@click.option("--set-aside", is_flag=True, help="No jobs, but the messages that were set aside, by reason.")
@click.option("--count", is_flag=True, help="Print only how many jobs there are.")
@click.option(
    "--limit", metavar="N", type=click.IntRange(1, 100_000), default=50, help="At most so many; 50 by default."
)
@watch_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    states: tuple[str, ...],
    failed: bool,
    task: str | None,
    worker: str | None,
    queue: str | None,
    group: str | None,
    since: float | None,
    set_aside: bool,
    count: bool,
    limit: int,
    watch: float | None,
    as_json: bool,
) -> None:
    """List jobs, the newest first.

    STATE is accepted, waiting, scheduled, admitted, running, replaced, succeeded, failed, cancelled, expired
    or lost. A job must meet all conditions. On a terminal ids are short, and commands take them so.

    The list is that of Postgres, which may be a second or two behind the ledger.
    """
    from celery_capacity.routing.inspect.job_list import JobFilter

    chosen = tuple(dict.fromkeys([*map(State, states), *(FAILED if failed else ())])) or tuple(State)
    wanted = JobFilter(chosen, task, worker, queue, group, since)
    if set_aside and wanted != JobFilter():
        raise WrongUsage("--set-aside lists messages, which no condition on jobs chooses", advice="Leave one out.")
    engine = stores_of(context).engine

    def draw(console: Console) -> None:
        if set_aside:
            _set_aside(console, engine, limit, count, as_json)
        elif count:
            _count(console, engine, wanted, as_json)
        else:
            _list(console, engine, wanted, limit, as_json)

    show(draw, watch, "jobs", in_place=not as_json)


def _set_aside(console: Console, engine: Engine, limit: int, count: bool, as_json: bool) -> None:
    from celery_capacity.platform.console import render
    from celery_capacity.routing.store import quarantine

    with engine.connect() as connection:
        quarantined = quarantine.read(connection, limit)
    if as_json:
        print_json(quarantined.messages if count else quarantined.to_json())
    elif count:
        console.print(str(quarantined.messages))
    else:
        render.quarantine(console, quarantined)


def _count(console: Console, engine: Engine, wanted: JobFilter, as_json: bool) -> None:
    from celery_capacity.routing.inspect import job_list

    with job_list.snapshot(engine) as connection:
        number = job_list.count(connection, wanted)
    if as_json:
        print_json(number)
    else:
        console.print(str(number))


def _list(console: Console, engine: Engine, wanted: JobFilter, limit: int, as_json: bool) -> None:
    from celery_capacity.platform.console import job_views
    from celery_capacity.routing.inspect import job_list
    from celery_capacity.routing.store import quarantine

    with job_list.snapshot(engine) as connection:
        listed = job_list.newest(connection, wanted, limit)
        total: int | None = len(listed.lines)
        if total == limit and not as_json:
            # Counting the selected jobs would take as long as a search through all of them.
            total = None if wanted.examines_rows else job_list.count(connection, wanted)
        quarantined = quarantine.read(connection)
    if as_json:
        print_json([line.to_json() for line in listed.lines])
    else:
        job_views.jobs(console, listed, total)
        job_views.set_aside(console, listed, quarantined)
