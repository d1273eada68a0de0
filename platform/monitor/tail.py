"""`celery -A platform tail`: what becomes of jobs, as it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_capacity.platform.console.command import Command, WrongUsage, json_option, stores_of
from celery_capacity.platform.console.job_ids import complete_id, whole_ids
from celery_capacity.platform.console.names import check_task, complete_task
from celery_capacity.platform.console.text_type import Text
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery_capacity.workers.process.stores import Stores


@click.command(
    "tail",
    cls=Command,
    examples=(
        ("One job until it has ended", "celery -A platform tail e4855c54"),
        ("All jobs of a module's tasks, until Ctrl-C", "celery -A platform tail --task 'video.*'"),
        ("All jobs, a JSON object a line", "celery -A platform tail --all --json"),
    ),
    codes={
        Exit.OK: "all named jobs have succeeded; or Ctrl-C, with --task or --all",
        Exit.FAILED: "a named job failed or was lost; or there is no such job or task",
        Exit.CANCELLED: "a named job was cancelled or expired, and none failed",
    },
)
@click.argument("jobs", metavar="[ID]...", nargs=-1, shell_complete=complete_id)
@click.option(
    "--task", metavar="NAME", type=Text(), shell_complete=complete_task, help="Jobs of this task; * is any text."
)
@click.option("--all", "every", is_flag=True, help="All jobs.")
@json_option
@click.pass_context
def command(context: click.Context, jobs: tuple[str, ...], task: str | None, every: bool, as_json: bool) -> None:
    """Print each state that jobs come into, as it happens, a line for each.

    With IDs it ends when these jobs have ended, with an exit code like that of `wait`. Else it ends by Ctrl-C. With
    --json a line is a JSON object.
    """
    from celery_capacity.platform.monitor import lines

    choices = [bool(jobs), task is not None, every]
    if sum(choices) != 1:
        raise WrongUsage("name jobs, or --task, or --all", advice="One of them says what to follow.")
    stores = stores_of(context)
    if jobs:
        raise SystemExit(_named(stores, jobs, as_json))
    if task is not None:
        with stores.engine.connect() as connection:
            check_task(connection, task)
    lines.follow_all(stores, task, lines.writer(as_json))


def _named(stores: Stores, jobs: tuple[str, ...], as_json: bool) -> Exit:
    """Follow jobs until they have ended, and return the exit code of a wait for them."""
    from celery_capacity.platform.actions.waiting import Awaited
    from celery_capacity.platform.monitor import lines
    from celery_capacity.routing.inspect.job_events import JobEvent
    from celery_capacity.routing.store import queries
    from celery_capacity.workers.client import following

    ids = whole_ids(stores.engine, jobs)
    with stores.engine.connect() as connection:
        files = {job: queries.find(connection, job) for job in ids}
    tasks = {job: str(file.job["name"]) for job, file in files.items() if file is not None}
    write, last = lines.writer(as_json), dict[str, JobEvent]()
    for event in following.follow(stores, ids):
        if event is not None:
            last[event.job] = event
            at = None if event.at is None else event.at.isoformat(timespec="milliseconds")
            write(lines.Line(event.job, tasks.get(event.job), event.state.value, event.attempt, event.worker, at))
    return Awaited(last, timed_out=False).code
