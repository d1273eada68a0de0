"""Orders of operators in words: cordoned workers, paused parts of the backlog, and the options of their commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from celery_capacity.platform.console.terminal import moment
from celery_capacity.platform.console.text_type import Text

if TYPE_CHECKING:
    from rich.console import Console

    from celery_capacity.routing.inspect.overview import Overview
    from celery_capacity.routing.store.controls import Cordon, Pause
    from celery_capacity.workers.client.controls import WorkerOrder

#: Cordoned workers that `cluster` names.
MAX_CORDONS: Final = 20
#: Text for an action that only Postgres knows yet.
LATER: Final = "Postgres has it. The ledger cannot be reached now: it takes effect there as soon as the ledger answers."

reason_option: Final = click.option("--reason", metavar="TEXT", type=Text(), help="Why; shown wherever this is shown.")
by_option: Final = click.option("--by", metavar="NAME", type=Text(), help="Who does it, instead of user@host.")


def lines(overview: Overview) -> list[str]:
    """Return a line for each pause and each cordon, as `cluster` shows them."""
    live = {worker.name for worker in overview.workers}
    cordons = [f"{cordoned(order)}{'' if order.worker in live else ', is down'}" for order in overview.orders.cordons]
    more = [f"and {len(cordons) - MAX_CORDONS} more workers"] if len(cordons) > MAX_CORDONS else []
    return [*map(paused, overview.orders.pauses), *cordons[:MAX_CORDONS], *more]


def show(console: Console, overview: Overview) -> None:
    """Print these lines, behind an empty one."""
    for number, line in enumerate(lines(overview)):
        console.print(f"{'' if number else chr(10)}{line}", style="yellow")


def paused(pause: Pause) -> str:
    """Return "paused: queue render since 2026-05-04 12:00:00 by ann@host (disk full)"."""
    return f"paused: {pause.scope} {_since(pause)}"


def cordoned(cordon: Cordon) -> str:
    """Return "cordoned: render-03 since 2026-05-04 12:00:00 by ann@host (new disk)"."""
    until = "" if cordon.drain_by is None else f", hands back at {moment(cordon.drain_by)}"
    then = ", then stops" if cordon.stops else ""
    return f"{cordon.status}: {cordon.worker} {_since(cordon)}{until}{then}"


def _since(order: Pause | Cordon) -> str:
    return f"since {moment(order.since)} by {order.by}{f' ({order.reason})' if order.reason else ''}"


def why_paused(pause: Pause | None) -> str:
    """Return the sentence for a job that a pause holds back."""
    if pause is None:
        return "It is paused."
    of = {"platform": "The platform", "queue": "Its queue", "task": "Its task"}[pause.scope.kind.value]
    option = f" --{pause.scope.kind.value} {pause.scope.name}" if pause.scope.name else ""
    return f"{of} is paused {_since(pause)}. To start it: celery -A platform resume{option}"


def why_cordoned(cordon: Cordon | None, worker: str | None) -> str:
    """Return the sentence for a job that only a cordoned worker has room for."""
    if cordon is None:
        return f"Only {worker} has room for it, which is cordoned."
    return (
        f"Only {worker} has room for it, which is {cordon.status} {_since(cordon)}."
        f" To use it: celery -A platform uncordon {worker}"
    )


def sentence(order: WorkerOrder) -> str:
    """Return what became of a worker that was cordoned, drained or let free."""
    jobs = f"{order.running} {'job runs' if order.running == 1 else 'jobs run'} there"
    if order.cordon is None:
        return "uncordoned: jobs are admitted again" if order.before else "was not cordoned"
    if not order.live:
        return f"{order.cordon.status}: it is not running, and takes nothing when it comes back"
    if not order.cordon.drains:
        return f"cordoned: it takes nothing more; {jobs}"
    end = "to their ends" if order.cordon.drain_by is None else f"until {moment(order.cordon.drain_by)}"
    return f"draining: it takes nothing more; {jobs}{f', {end}' if order.running else ''}"
