"""`celery -A platform up`: servers, workers, beat and the dashboard on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import sys
from contextlib import closing

import click

from celery_capacity.platform.console.command import Command, settings_of_environment
from celery_capacity.platform.console.terminal import facts, print_json, table, talk
from celery_capacity.platform.processes.launch import Interrupted, WorkerSpec, parse_workers
from celery_capacity.platform.processes.local_cluster import LocalCluster
from celery_capacity.platform.processes.supervisor import Supervisor, prefixed
from celery_capacity.workers.process.exit_codes import Exit

__all__ = ["command"]


@click.command(
    "up",
    cls=Command,
    examples=(
        ("One worker with all of this machine", "celery -A platform up"),
        ("Two workers that share it", "celery -A platform up --worker worker-01=12 --worker worker-02=4"),
        ("A rehearsal on threads, with more CPUs than there are", "celery -A platform up --worker big=72 -P threads"),
    ),
    codes={Exit.OK: "ended by Ctrl-C or `kill`", Exit.FAILED: "no worker became ready, or none is left"},
    never=(Exit.INTERRUPTED,),
)
@click.option(
    "--worker",
    "workers",
    metavar="NAME=CPUS",
    multiple=True,
    callback=parse_workers,
    help="A worker to start; again for more.",
)
@click.option(
    "-P", "--pool", metavar="POOL", type=click.Choice(["prefork", "threads", "solo"]), help="Pool of the workers."
)
@click.option("--json", "as_json", is_flag=True, help="Print what runs as JSON once it is ready.")
def command(workers: tuple[WorkerSpec, ...], pool: str | None, as_json: bool) -> None:
    """Run the platform on this machine until Ctrl-C.

    Starts the embedded servers (unless REDIS_URL and DATABASE_URL are set), brings the tables up to date, and
    starts workers, beat and the dashboard; prints what runs where. Ctrl-C ends the workers warm (running jobs
    come to their end), then beat, then the dashboard; Ctrl-C again breaks running jobs off. The servers stay
    until `celery -A platform down`.

    Without --worker there is one with all of this machine. Several share its memory as they do its CPUs.
    POOL is prefork (the default), threads (that of a worker with more CPUs than this machine has) or solo.
    """
    console = talk()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    supervisor = Supervisor(prefixed(sys.stderr))
    with closing(supervisor), supervisor.interruptible():
        cluster = LocalCluster(settings_of_environment(), os.environ, supervisor, say)
        try:
            cluster.start(workers, pool)
            _show(cluster, as_json)
            cluster.watch()
        except Interrupted:
            say("Ending.")
        finally:
            cluster.end()
        embedded = "; `celery -A platform down` ends them" if cluster.embedded else ""
        say(f"Ended. The servers stay{embedded}.")


def _show(cluster: LocalCluster, as_json: bool) -> None:
    running = cluster.describe()
    if as_json:
        print_json(running.to_json())
        return
    console = facts()
    table(console, ("what", "pid", "where"), running.rows(), right=(1,))
    console.print()
    look = "Look from anywhere: celery -A platform cluster"
    if running.dashboard is not None:
        look += f", or curl {running.dashboard_url}"
    console.print(look, soft_wrap=True)
    console.print("Ctrl-C ends the workers, beat and the dashboard; the servers stay.", soft_wrap=True)
