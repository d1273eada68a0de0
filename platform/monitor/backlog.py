"""`celery -A platform backlog`: what waits, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.terminal import print_json
from celery_capacity.platform.console.watch import show, watch_option

if TYPE_CHECKING:
    from rich.console import Console


@click.command(
    "backlog",
    cls=Command,
    examples=(
        ("What waits, in groups, each with its reason", "celery -A platform backlog"),
        ("The same again every 5 s", "celery -A platform backlog --watch 5"),
        ("The same for a program", "celery -A platform backlog --json"),
    ),
)
@watch_option
@json_option
@click.pass_context
def command(context: click.Context, watch: float | None, as_json: bool) -> None:
    """List what waits, in groups of jobs alike in task, request, queue, priority and tenant.

    Groups that no worker can ever take stand first. The reason and the estimated start are those of the first job of a
    group. `job ID` says more about one job.
    """
    from celery_capacity.platform.console import held_back
    from celery_capacity.platform.monitor import tables
    from celery_capacity.platform.web import waiting_groups
    from celery_capacity.routing.inspect import overview
    from celery_capacity.routing.ledger.connection import quick_client

    stores = stores_of(context)
    settings, client = stores.settings, quick_client(stores.redis)

    def draw(console: Console) -> None:
        seen = overview.read(client, stores.engine, settings.worker_ttl)
        with stores.engine.connect() as connection:
            groups = waiting_groups.read(connection, client, settings)
        if as_json:
            print_json(waiting_groups.document(seen.to_json(), groups))
            return
        tables.backlog(console, groups, seen.waiting)
        held_back.show(console, seen)

    show(draw, watch, "backlog", in_place=not as_json)
