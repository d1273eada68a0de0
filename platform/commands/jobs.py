"""`celery -A platform jobs`: the list of jobs, newest first."""

from __future__ import annotations

import click

from platform import render
from platform.edge import answering, json_option, stores_of
from platform.terminal import facts, print_json
from routing import lookup
from routing.states import State

__all__ = ["command"]


@click.command("jobs")
@click.option("--state", type=click.Choice([state.value for state in State]), help="Only jobs in this state.")
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="At most so many jobs."
)
@json_option
@click.pass_context
def command(context: click.Context, state: str | None, limit: int, as_json: bool) -> None:
    """List jobs, the newest first."""
    with answering(as_json):
        chosen = None if state is None else State(state)
        with stores_of(context).engine.connect() as connection:
            lines = lookup.newest(connection, chosen, limit)
            total = lookup.count(connection, chosen) if len(lines) == limit else len(lines)
    if as_json:
        print_json([line.to_json() for line in lines])
    else:
        render.jobs(facts(), lines, total)
