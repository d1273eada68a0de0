"""`celery -A platform workers`: the live workers, chosen and sorted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.heartbeats import silent_after
from celery_capacity.platform.console.names import complete_worker, is_like
from celery_capacity.platform.console.terminal import print_json, talk
from celery_capacity.platform.console.text_type import Text
from celery_capacity.platform.console.watch import show, watch_option
from celery_capacity.platform.monitor.sorting import ORDERS, ordered
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy import Engine

    from celery_capacity.routing.inspect.worker_lines import WorkerLine

#: Advice where no worker lives.
START_ONE: Final = "No worker lives. Start one: `celery -A platform worker`."


@click.command(
    "workers",
    cls=Command,
    examples=(
        ("All live workers, the fullest first", "celery -A platform workers --sort cpus"),
        ("Those of a name, again every 2 s", "celery -A platform workers 'render-*' --watch"),
        ("Two of them, for a program", "celery -A platform workers worker-01 worker-02 --json"),
    ),
    codes={Exit.FAILED: "a named worker does not live; the nearest names are shown"},
)
@click.argument("names", metavar="[NAME]...", nargs=-1, type=Text(), shell_complete=complete_worker)
@click.option(
    "--sort", "order", metavar="ORDER", type=click.Choice(list(ORDERS)), default="name", help="Order; name by default."
)
@watch_option
@json_option
@click.pass_context
def command(context: click.Context, names: tuple[str, ...], order: str, watch: float | None, as_json: bool) -> None:
    """List the live workers: status, allocations, heartbeat, queues and labels.

    NAME is the name of a worker; * is any text. ORDER is name, or what comes first: cpus and memory (the largest share
    allocated), jobs (the most), heartbeat (the oldest).
    """
    from celery_capacity.platform.console import render
    from celery_capacity.routing.inspect import overview
    from celery_capacity.routing.ledger.connection import quick_client

    stores = stores_of(context)
    settings, client = stores.settings, quick_client(stores.redis)

    def draw(console: Console) -> None:
        seen = overview.read(client, stores.engine, settings.worker_ttl)
        chosen = ordered(choose(seen.workers, names, stores.engine), order)
        if as_json:
            whole = [worker.to_json() for worker in chosen]
            print_json({"workers": whole, "source": seen.source.value, "at": seen.to_json()["at"]})
        elif chosen:
            render.worker_table(console, chosen, seen.resources, silent_after(settings, seen.source))
        else:
            console.print("no workers")
        if not seen.workers and not watch:
            talk().print(START_ONE)

    show(draw, watch, "workers", in_place=not as_json)


def choose(workers: Sequence[WorkerLine], names: Sequence[str], engine: Engine) -> list[WorkerLine]:
    """Return the workers of these names, all without one. Raises `InvalidRequest` for a name that none has.

    `*` in a name stands for any text, and such a pattern may match no worker.
    """
    live = [worker.name for worker in workers]
    for name in names:
        if "*" not in name and name not in live:
            raise _not_live(name, live, engine)
    if not names:
        return list(workers)
    return [worker for worker in workers if any(is_like(worker.name, name) for name in names)]


def _not_live(name: str, live: Sequence[str], engine: Engine) -> InvalidRequest:
    """Return the error for a name that no live worker has: it may be that of a worker which is down."""
    from sqlalchemy.exc import DBAPIError

    from celery_capacity.workers.client.controls import unknown_worker, worker_names

    try:
        with engine.connect() as connection:
            existing = worker_names(connection)
    except DBAPIError:
        existing = []  # the ledger knows the live ones
    if name not in existing:
        return unknown_worker(name, list(dict.fromkeys([*live, *existing])))
    advice = f"`celery -A platform jobs --worker {name}` lists its jobs."
    return InvalidRequest(f"worker {name} is down", value=name, advice=advice)
