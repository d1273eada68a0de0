"""Orders of operators in words: cordoned workers, paused parts of the backlog, and the options of their commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from celery_capacity.platform.console.terminal import moment
from celery_capacity.platform.console.text_type import Text

if TYPE_CHECKING:
    from rich.console import Console

    from celery_capacity.routing.insert.key_lines import HeldBy, KeyLine
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
    """Return a line for each pause, each cordon and each key that jobs wait for, as `cluster` shows them."""
    live = overview.live
    cordons = [f"{cordoned(order)}{'' if order.worker in live else ', is down'}" for order in overview.orders.cordons]
    more = [f"and {len(cordons) - MAX_CORDONS} more workers"] if len(cordons) > MAX_CORDONS else []
    return [*map(paused, overview.orders.pauses), *cordons[:MAX_CORDONS], *more, *map(waited_for, overview.keys)]


def show(console: Console, overview: Overview) -> None:
    """Print these lines, behind an empty one."""
    for number, line in enumerate(lines(overview)):
        console.print(f"{'' if number else chr(10)}{line}", style="yellow")


def paused(pause: Pause) -> str:
    """Return "paused: queue render since 2026-05-04 12:00:00 by ann@host (disk full)"."""
    return f"paused: {pause.scope} {_since(pause)}"


def waited_for(line: KeyLine) -> str:
    """Return "limit of key customer:42: 2 jobs hold it, 1,200 wait"."""
    holding = f"{line.holding:,} {'job holds' if line.holding == 1 else 'jobs hold'} it"
    return f"limit of key {line.key}: {holding}, {'more than ' if line.more else ''}{line.waiting:,} wait"


def why_reserved(worker: str | None, tenant: str | None) -> str:
    """Say that the only room is reserved. `tenant`: of the reserved job, where its turn is the reason."""
    whose = "that comes before it" if tenant is None else f"of tenant {tenant}, which comes first"
    return f"Only {worker} has room, and it is reserved for a job {whose}."


def why_key(key: HeldBy | None) -> str:
    """Return the sentence for a job that the limit of a key holds back."""
    if key is None:
        return "The limit of one of its keys holds it back."
    behind = f"It is number {key.place_in_line:,} of those that wait with equal limits."
    if key.limit is None or key.holding < key.limit:
        next_at = f", the next at {moment(key.next_at)}" if key.next_at is not None else ""
        rate = f"The rate of its key {key.key} is {key.rate}{next_at}." if key.rate else ""
        return f"{rate or f'Its key {key.key} has room, and it is about to start.'} {behind}"
    more = f" and {key.holding - len(key.holders):,} more" if key.holding > len(key.holders) else ""
    at_once = f"at most {key.limit:,} {'job' if key.limit == 1 else 'jobs'} at once"
    holders = f"{', '.join(key.holders)}{more} {'holds' if key.holding == 1 else 'hold'} it"
    return f"The limit of its key {key.key} is {at_once}, and {holders}. {behind}"


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
    of = {"platform": "The platform", "queue": "Its queue", "task": "Its task", "tenant": "Its tenant"}[
        pause.scope.kind.value
    ]
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
