"""`celery -A platform cluster`: totals, a line per worker, the backlog by request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.heartbeats import silent_after
from celery_capacity.platform.console.terminal import print_json, talk
from celery_capacity.platform.console.text_type import Text
from celery_capacity.platform.console.watch import show, watch_option

if TYPE_CHECKING:
    from rich.console import Console


@click.command(
    "cluster",
    cls=Command,
    examples=(
        ("What there is, what is allocated and what waits", "celery -A platform cluster"),
        ("The same again every 5 s", "celery -A platform cluster --watch 5"),
        ("The same for a program", "celery -A platform cluster --json"),
        ("The next 100 workers behind render-099", "celery -A platform cluster --limit 100 --after render-099"),
    ),
)
@click.option("--limit", metavar="N", type=click.IntRange(1, 100_000), help="At most so many workers.")
@click.option("--after", metavar="NAME", type=Text(), default="", help="Workers behind this one, by name.")
@watch_option
@json_option
@click.pass_context
def command(context: click.Context, limit: int | None, after: str, watch: float | None, as_json: bool) -> None:
    """Show the cluster: totals, each worker, and what waits.

    Jobs that no worker can take, not even an empty one, stand first. A worker whose heartbeat is late is
    "silent". The totals are those of all workers, also with --limit. The numbers come from the ledger; while it
    does not answer, from Postgres, and the answer says so.
    """
    from celery_capacity.platform.console import render
    from celery_capacity.routing.inspect import overview
    from celery_capacity.routing.inspect.worker_lines import Page
    from celery_capacity.routing.ledger.connection import quick_client

    stores = stores_of(context)
    settings, client = stores.settings, quick_client(stores.redis)

    def draw(console: Console) -> None:
        seen = overview.read(client, stores.engine, settings.worker_ttl, Page(limit, after))
        if seen.is_new:
            talk().print("No worker has started yet. Start one: `celery -A platform worker`.")
        elif seen.why and not watch:
            talk().print(f"The ledger cannot be asked: {seen.why}")
        if as_json:
            print_json(seen.to_json())
        else:
            render.cluster(console, seen, silent_after(settings, seen.source))

    show(draw, watch, "cluster", in_place=not as_json)
