"""`celery -A platform stats`: the figures of each task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.names import check_task, complete_task
from celery_capacity.platform.console.terminal import print_json, talk
from celery_capacity.platform.console.text_type import Text
from celery_capacity.platform.console.watch import show, watch_option
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from rich.console import Console


@click.command(
    "stats",
    cls=Command,
    examples=(
        ("Each task: jobs, failures, waits and run times", "celery -A platform stats"),
        ("The tasks of a module", "celery -A platform stats --task 'video.*'"),
        ("One task, for a program", "celery -A platform stats --task demo.sleep --json"),
    ),
    codes={Exit.FAILED: "there is no such task; the nearest are named"},
)
@click.option(
    "--task", metavar="NAME", type=Text(), shell_complete=complete_task, help="Only this task; * is any text."
)
@watch_option
@json_option
@click.pass_context
def command(context: click.Context, task: str | None, watch: float | None, as_json: bool) -> None:
    """Show the figures of each task: jobs by state, the share that failed, how long they waited and ran.

    They are counted over the newest 20,000 jobs of all tasks. p50 is the median; 5 % of the jobs take longer than p95.
    """
    from celery_capacity.platform.monitor import tables
    from celery_capacity.platform.web import task_statistics

    engine = stores_of(context).engine

    def draw(console: Console) -> None:
        with engine.connect() as connection:
            figures = task_statistics.read(connection, task)
            if task is not None and not figures["tasks"]:
                check_task(connection, task)
                if not watch:
                    talk().print(f"None of the newest {task_statistics.SAMPLE:,} jobs is of {task}.")
        if as_json:
            print_json(figures)
        else:
            tables.statistics(console, figures)

    show(draw, watch, "stats", in_place=not as_json)
