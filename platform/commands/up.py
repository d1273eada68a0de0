"""`celery -A platform up`: servers, workers, beat and the dashboard on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import sys
from contextlib import closing

import click

from platform.edge import answering
from platform.launch import Interrupted, WorkerSpec, parse_workers
from platform.processes import Family, prefixed
from platform.station import Station
from platform.terminal import facts, print_json, table, talk
from routing.settings import Settings

__all__ = ["command"]


@click.command("up")
@click.option(
    "--worker",
    "workers",
    metavar="NAME=CPUS",
    multiple=True,
    callback=parse_workers,
    help="A worker to start; may be given more than once. Their shares of the memory are as their CPUs."
    " Default: one with all of this machine.",
)
@click.option(
    "-P",
    "--pool",
    type=click.Choice(["prefork", "threads", "solo"]),
    help="Pool of the workers. Default: prefork; threads for a worker with more CPUs than this machine has.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what runs as one JSON line once all of it is ready.")
def command(workers: tuple[WorkerSpec, ...], pool: str | None, as_json: bool) -> None:
    """Run the platform on this machine until Ctrl-C.

    Starts the embedded servers (unless REDIS_URL and DATABASE_URL are set), brings the tables up to date, and
    starts workers, beat and the dashboard; prints what runs where. Ctrl-C ends the workers warm (running jobs
    come to their end), then beat, then the dashboard; Ctrl-C again breaks running jobs off. The servers stay
    until `celery -A platform down`.
    """
    console = talk()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    family = Family(prefixed(sys.stderr))
    with answering(as_json), closing(family), family.interruptible():
        station = Station(Settings.from_environ(os.environ), os.environ, family, say)
        try:
            station.start(workers, pool)
            _show(station, as_json)
            station.watch()
        except Interrupted:
            say("Ending.")
        finally:
            station.end()
        embedded = "; `celery -A platform down` ends them" if station.embedded else ""
        say(f"Ended. The servers stay{embedded}.")


def _show(station: Station, as_json: bool) -> None:
    running = station.describe()
    if as_json:
        print_json(running.to_json())
        return
    console = facts()
    table(console, ("what", "where", "pid"), running.rows(), right=(2,))
    console.print()
    look = "Look from anywhere: celery -A platform cluster"
    if running.dashboard is not None:
        look += f", or curl {running.dashboard_url}"
    console.print(look, soft_wrap=True)
    console.print("Ctrl-C ends the workers, beat and the dashboard; the servers stay.", soft_wrap=True)
