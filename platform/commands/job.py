"""`celery -A platform job ID`: one job, and why it waits."""

from __future__ import annotations

import click

from platform import exits, render
from platform.edge import answering, json_option, stores_of
from platform.terminal import facts, fail, print_json
from routing import explain, lookup, overview
from routing.errors import InvalidRequest
from routing.names import check_job_id

__all__ = ["command"]


@click.command("job")
@click.argument("job_id", metavar="ID")
@json_option
@click.pass_context
def command(context: click.Context, job_id: str, as_json: bool) -> None:
    """Show one job: its times, its worker, its attempts, and why it waits.

    Exit code 1 where there is no such job; the nearest ids are named.
    """
    with answering(as_json):
        check_job_id(job_id)
        stores = stores_of(context)
        with stores.engine.connect() as connection:
            found = lookup.find(connection, job_id)
            if found is None:
                near = lookup.nearest(connection, job_id)
                fail(_unknown(job_id, near), as_json)
                context.exit(exits.FAILED)
            why = explain.explain(overview.quick(stores.redis), connection, job_id)
    if as_json:
        print_json({**found.to_json(), "why": None if why is None else why.to_json()})
    else:
        render.job(facts(), found, why)


def _unknown(job_id: str, near: list[str]) -> InvalidRequest:
    advice = f"The nearest: {', '.join(near)}." if near else "`celery -A platform jobs` lists the newest."
    return InvalidRequest(f"there is no job {job_id}", value=job_id, advice=advice)
