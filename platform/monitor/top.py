"""`celery -A platform top`: workers, backlog and reasons, live."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.durations import Duration
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.platform.console.watch import EVERY, LONGEST, SHORTEST
from celery_capacity.platform.monitor.sorting import ORDERS
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "top",
    cls=Command,
    examples=(
        ("Workers and what waits, until q", "celery -A platform top"),
        ("The fullest workers first, every 5 s", "celery -A platform top --sort cpus --every 5"),
        ("Once, for a program", "celery -A platform top --json"),
    ),
    codes={Exit.OK: "ended by q or Ctrl-C; or printed once"},
    never=(Exit.INTERRUPTED,),
)
@click.option(
    "--sort", "order", metavar="ORDER", type=click.Choice(list(ORDERS)), default="name", help="Order; name by default."
)
@click.option(
    "--every",
    metavar="SECONDS",
    type=Duration(SHORTEST, LONGEST),
    default=EVERY,
    help=f"Seconds between two pictures; {EVERY:g} by default.",
)
@json_option
@click.pass_context
def command(context: click.Context, order: str, every: float, as_json: bool) -> None:
    """Show workers, what waits and why, live, until q.

    ORDER is name, cpus, memory, jobs or heartbeat, as of `workers`. Its first letter changes it: n, c, m, j, h. The
    space bar looks anew. Where the output is no terminal, and with --json, it prints once.
    """
    from celery_capacity.platform.monitor import screen

    cluster = screen.Cluster(stores_of(context))
    if as_json:
        print_json(cluster.read().to_json(order))
    elif not facts().is_terminal:
        cluster.read().draw(facts(), order, None)
    else:
        screen.run(cluster, order, every)
