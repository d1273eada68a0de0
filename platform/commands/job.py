"""`celery -A platform job ID`: one job, and why it waits."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.job_ids import complete_id
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "job",
    cls=Command,
    examples=(
        ("What happened to it, and why it waits", "celery -A platform job e4855c54"),
        ("The same for a program", "celery -A platform job e4855c54-e3fb-4f71-a177-e89ef6cfe2d5 --json"),
    ),
    codes={Exit.FAILED: "there is no such job; the nearest ids are named"},
)
@click.argument("job_id", metavar="ID", shell_complete=complete_id)
@json_option
@click.pass_context
def command(context: click.Context, job_id: str, as_json: bool) -> None:
    """Show one job: what happened to it, and why it waits.

    ID is the id of the Celery task, or its first four characters or more, as `jobs` shows them.
    """
    from celery_capacity.platform.console import job_document, job_views

    document = job_document.read(stores_of(context), lambda: context.obj.app, job_id)
    if as_json:
        print_json(document.to_json())
    else:
        job_views.job(facts(), document.file, document.why, document.call)
