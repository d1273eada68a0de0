"""`celery -A platform logs ID`: what a job has logged and printed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.job_ids import complete_id, whole_ids
from celery_capacity.platform.console.terminal import facts, harmless, moment, print_json, talk
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery_capacity.routing.database.job_lines import JobLine, Position
    from celery_capacity.workers.process.stores import Stores

#: Seconds between two looks for new lines, and looks without a line after the job's end. Its worker writes them soon.
LOOK: Final = 0.5
LAST_LOOKS: Final = 4


@click.command(
    "logs",
    cls=Command,
    examples=(
        ("What a job has logged and printed", "celery -A platform logs e4855c54"),
        ("And what it goes on to log, until it has ended", "celery -A platform logs e4855c54 --follow"),
        ("Its first attempt alone", "celery -A platform logs e4855c54 --attempt 1"),
    ),
    codes={Exit.FAILED: "there is no such job; the nearest ids are named"},
)
@click.argument("job_id", metavar="ID", shell_complete=complete_id)
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended.")
@click.option("--attempt", metavar="N", type=click.IntRange(1, 2**31 - 1), help="Lines of this attempt alone.")
@json_option
@click.pass_context
def command(context: click.Context, job_id: str, follow: bool, attempt: int | None, as_json: bool) -> None:
    """Print the lines of a job's own log that are kept, the oldest first.

    Workers with PLATFORM_KEEP_LOGS keep so many of each job's newest lines, until the job moves into the archive. ID is
    the id of the Celery task, or its first four characters or more. With --json a line is a JSON object.
    """
    stores = stores_of(context)
    (job,) = whole_ids(stores.engine, [job_id])
    printer = _Printer(as_json)
    if follow:
        _follow(stores, job, attempt, printer)
    else:
        printer.print(_read(stores, job, attempt, None))
    if printer.last is None and not as_json:
        talk().print("No lines of it are kept. Workers keep lines where PLATFORM_KEEP_LOGS is set.")


class _Printer:
    """Printer of lines, which says where some are missing. `last`: the line that was printed last."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._console = facts()
        self.last: JobLine | None = None

    def print(self, lines: list[JobLine]) -> None:
        for line in lines:
            if self._as_json:
                print_json(line.to_json())
            else:
                self._print(line)
            self.last = line

    def _print(self, line: JobLine) -> None:
        last = self.last
        is_same = last is not None and last.position[:2] == line.position[:2]
        if not is_same and (last is not None or line.attempt > 1):
            self._console.print(f"attempt {line.attempt}:", style="bold")
        if missing := line.number - 1 - (last.number if is_same and last is not None else 0):
            self._console.print(f"({missing:,} lines are not kept)", style="dim")
        text = harmless(f"{moment(line.time)}  {line.level:<8}{line.message}")
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


def _read(stores: Stores, job: str, attempt: int | None, after: Position | None) -> list[JobLine]:
    from celery_capacity.routing.config.setting_values import MAX_KEPT_LINES
    from celery_capacity.routing.database import job_lines

    with stores.engine.connect() as connection:
        return job_lines.read(connection, job, MAX_KEPT_LINES, attempt, after)


def _follow(stores: Stores, job: str, attempt: int | None, printer: _Printer) -> None:
    """Print lines until the job has ended, and its last lines had time to come."""
    from celery_capacity.routing.inspect import job_events

    looks = LAST_LOOKS
    while looks:
        with stores.engine.connect() as connection:
            event = job_events.in_postgres(connection, job)
        lines = _read(stores, job, attempt, printer.last.position if printer.last is not None else None)
        printer.print(lines)
        looks = looks - 1 if (event is None or event.final) and not lines else LAST_LOOKS
        if looks:
            time.sleep(LOOK)
