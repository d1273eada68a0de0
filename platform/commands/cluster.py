"""`celery -A platform cluster`: totals, a line per worker, the backlog by request."""

from __future__ import annotations

import click

from celery_capacity.platform.console import render
from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.terminal import facts, print_json, talk
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.ledger.connection import quick_client

__all__ = ["command"]


@click.command(
    "cluster",
    cls=Command,
    examples=(
        ("What there is, what is allocated and what waits", "celery -A platform cluster"),
        ("The same for a program", "celery -A platform cluster --json"),
    ),
)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Show the cluster: totals, each worker, and what waits.

    The numbers come from the ledger; where that is cold or does not answer, from Postgres, and the answer
    says so.
    """
    stores = stores_of(context)
    seen = overview.read(quick_client(stores.redis), stores.engine, stores.settings.worker_ttl)
    if seen.why:
        talk().print(f"The ledger cannot be asked: {seen.why}", soft_wrap=True)
    if as_json:
        print_json(seen.to_json())
    else:
        render.cluster(facts(), seen)
