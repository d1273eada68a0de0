"""`celery -A platform jobs`: the list of jobs, newest first."""

from __future__ import annotations

import click

from celery_capacity.platform.console import render
from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.routing.model.states import State
from celery_capacity.routing.store import queries

__all__ = ["command"]


@click.command(
    "jobs",
    cls=Command,
    examples=(
        ("The newest 50", "celery -A platform jobs"),
        ("The newest ten that failed", "celery -A platform jobs --state failed --limit 10"),
        ("What waits, for a program", "celery -A platform jobs --state waiting --json"),
    ),
)
@click.option(
    "--state", metavar="STATE", type=click.Choice([state.value for state in State]), help="Only jobs in this state."
)
@click.option(
    "--limit", metavar="N", type=click.IntRange(1, 100_000), default=50, help="At most so many; 50 by default."
)
@json_option
@click.pass_context
def command(context: click.Context, state: str | None, limit: int, as_json: bool) -> None:
    """List jobs, the newest first.

    STATE is accepted, waiting, scheduled, admitted, running, replaced, succeeded, failed, cancelled, expired
    or lost. The list is that of Postgres, which may be a second or two behind the ledger.
    """
    chosen = None if state is None else State(state)
    with stores_of(context).engine.connect() as connection:
        lines = queries.newest(connection, chosen, limit)
        total = queries.count(connection, chosen) if len(lines) == limit else len(lines)
    if as_json:
        print_json([line.to_json() for line in lines])
    else:
        render.jobs(facts(), lines, total)
