"""`celery -A platform job ID`: one job, and why it waits."""

from __future__ import annotations

import click

from celery_capacity.platform.console import render
from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.inspect import explain
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.store import queries
from celery_capacity.workers.process.exit_codes import Exit

__all__ = ["command"]


class UnknownJob(InvalidRequest):
    """No job has this id."""

    reference = "unknown-job"
    title = "there is no such job"
    status = 404


@click.command(
    "job",
    cls=Command,
    examples=(
        ("Its times, its attempts, and why it waits", "celery -A platform job e4855c54-e3fb-4f71-a177-e89ef6cfe2d5"),
        ("The same for a program", "celery -A platform job e4855c54-e3fb-4f71-a177-e89ef6cfe2d5 --json"),
    ),
    codes={Exit.FAILED: "there is no such job; the nearest ids are named"},
)
@click.argument("job_id", metavar="ID")
@json_option
@click.pass_context
def command(context: click.Context, job_id: str, as_json: bool) -> None:
    """Show one job: its times, its worker, its attempts, and why it waits.

    ID is the id of the Celery task.
    """
    check_job_id(job_id)
    stores = stores_of(context)
    with stores.engine.connect() as connection:
        file = queries.find(connection, job_id)
        if file is None:
            raise _unknown(job_id, queries.nearest(connection, job_id))
        why = explain.explain(quick_client(stores.redis), connection, job_id)
    if as_json:
        print_json({**file.to_json(), "why": None if why is None else why.to_json()})
    else:
        render.job(facts(), file, why)


def _unknown(job_id: str, near: list[str]) -> UnknownJob:
    advice = f"The nearest: {', '.join(near)}." if near else "`celery -A platform jobs` lists the newest."
    return UnknownJob(f"there is no job {job_id}", value=job_id, advice=advice)
