"""`celery -A platform wait ID…`: wait until jobs have ended; the exit code says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_capacity.platform.actions.wait_codes import CODES, timeout_option
from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.job_ids import complete_id, whole_ids
from celery_capacity.platform.console.terminal import print_json, talk

if TYPE_CHECKING:
    from celery_capacity.routing.inspect.job_events import JobEvent


@click.command(
    "wait",
    cls=Command,
    examples=(
        ("Until one job has ended", "celery -A platform wait e4855c54-e3fb-4f71-a177-e89ef6cfe2d5"),
        ("At most ten minutes", "celery -A platform wait e4855c54-e3fb-4f71 --timeout 600"),
    ),
    codes=CODES,
)
@click.argument("jobs", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@timeout_option("Wait no longer than that.")
@json_option
@click.pass_context
def command(context: click.Context, jobs: tuple[str, ...], timeout: float | None, as_json: bool) -> None:
    """Wait until these jobs have ended, and say how each ended.

    On a terminal a bar shows how far they are. The exit code is 0 if all have succeeded. Nothing is asked while nothing
    happens: the ends are heard of.
    """
    from celery_capacity.platform.actions.waiting import wait_for

    stores = stores_of(context)
    ids = whole_ids(stores.engine, jobs)

    def line_of(event: JobEvent) -> str:
        return f"{event.job}  {event.state.value}"

    awaited = wait_for(stores, ids, timeout, None if as_json else line_of)
    if as_json:
        print_json(awaited.to_json())
    elif awaited.timed_out:
        active = [job for job in ids if job not in awaited.events or not awaited.events[job].final]
        talk().print(f"not ended after {timeout:g} s: {', '.join(active)}")
    raise SystemExit(awaited.code)
