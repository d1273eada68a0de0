"""The screen of `top`: the cluster at a moment, cut to the lines of a terminal, and the keys that change it."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from rich.live import Live
from rich.text import Text

from celery_capacity.platform.console import held_back, render
from celery_capacity.platform.console.command import problem_of_store
from celery_capacity.platform.console.heartbeats import silent_after
from celery_capacity.platform.console.terminal import facts
from celery_capacity.platform.console.watch import giving_back, picture, whole_screen
from celery_capacity.platform.monitor import tables
from celery_capacity.platform.monitor.sorting import ORDERS, ordered
from celery_capacity.platform.monitor.typed import Keys
from celery_capacity.platform.web.waiting_groups import WaitingGroups
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.inspect.overview import Overview
from celery_capacity.routing.ledger.connection import quick_client

if TYPE_CHECKING:
    from rich.console import Console

    from celery_capacity.workers.process.stores import Stores

#: Order of the workers for each key.
KEYS: Final = {order[0]: order for order in ORDERS}
#: Lines of a screen beside the tables of workers and of the backlog: heads, headers, totals and empty lines.
OTHER_LINES: Final = 13
#: Fewest lines of a table.
FEWEST: Final = 3


@dataclass(frozen=True, slots=True)
class Moment:
    """The cluster at a moment. `groups`: None where Postgres does not answer, for the reason `why`."""

    seen: Overview
    groups: Sequence[Mapping[str, Any]] | None
    why: str
    silent: float

    def to_json(self, order: str) -> dict[str, Any]:
        """Return the object of `top --json`."""
        document = self.seen.to_json()
        workers = [worker.to_json() for worker in ordered(self.seen.workers, order)]
        shown = {name: document[name] for name in ("pauses", "source", "at")}
        return {"resources": document["resources"], "workers": workers, "groups": self.groups, **shown}

    def draw(self, console: Console, order: str, height: int | None) -> None:
        """Print the totals, the workers in this order, and what waits. `height`: lines that there are, None for all."""
        seen, groups = self.seen, self.groups or []
        first, second = shares(len(seen.workers), len(groups), height)
        render.totals(console, seen, seen.resources)
        if seen.workers:
            console.print()
            shown = ordered(seen.workers, order)[:first]
            render.worker_table(console, shown, seen.resources, self.silent)
            _more(console, seen.workers, first, "workers")
        else:
            console.print("no workers")
        console.print()
        if self.groups is None:
            console.print(f"Why jobs wait is unknown: {self.why}", style="yellow")
        else:
            tables.backlog(console, groups[:second], seen.waiting)
            _more(console, groups, second, "groups")
        held_back.show(console, seen)


def shares(workers: int, groups: int, height: int | None) -> tuple[int | None, int | None]:
    """Return the lines for workers and for groups. The backlog leaves to the workers what it does not need."""
    if height is None:
        return None, None
    lines = max(2 * FEWEST, height - OTHER_LINES)
    second = max(FEWEST, min(groups, lines // 2), lines - workers)
    return max(FEWEST, lines - min(groups, second)), second


def _more(console: Console, items: Sequence[Any], shown: int | None, what: str) -> None:
    if shown is not None and len(items) > shown:
        console.print(f"… and {len(items) - shown} more {what}", style="dim")


class Cluster:
    """Reader of a cluster, for one moment after the other."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._client = quick_client(stores.redis)
        self._groups = WaitingGroups()

    def read(self) -> Moment:
        """Return the cluster now. Raises where neither store answers."""
        settings = self._stores.settings
        seen = overview.read(self._client, self._stores.engine, settings.worker_ttl)
        groups, why = None, ""
        try:
            with self._stores.engine.connect() as connection:
                groups = self._groups.read(connection, self._client, settings)
        except Exception as error:
            problem = problem_of_store(error)
            if problem is None:
                raise
            why = problem.message
        return Moment(seen, groups, why, silent_after(settings, seen.source))


def run(cluster: Cluster, order: str, every: float) -> None:
    """Draw the cluster in place until q or Ctrl-C. An error of the first reading is raised, a later one is shown."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # The command's own handler ends the process at once, which would leave the terminal in its second screen.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(KeyboardInterrupt), giving_back():
        _run(cluster, order, every)


def _run(cluster: Cluster, order: str, every: float) -> None:
    console, began, problem = facts(), time.monotonic(), ""
    moment = cluster.read()
    # A cluster that takes long to read is read more seldom.
    due = time.monotonic() + max(every, time.monotonic() - began)
    live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with Keys() as keys, whole_screen(live):
        while True:
            live.update(_shown(console, moment, order, problem), refresh=True)
            key = keys.wait(max(due - time.monotonic(), 0.0))
            if key in ("q", "Q"):
                return
            if key in KEYS:
                order = KEYS[key]
                continue
            began = time.monotonic()
            try:
                moment, problem = cluster.read(), ""
            except Exception as error:
                of_store = problem_of_store(error)
                if of_store is None:
                    raise
                problem = str(of_store)
            due = time.monotonic() + max(every, time.monotonic() - began)


def _shown(console: Console, moment: Moment, order: str, problem: str) -> Text:
    keys = " ".join(f"{key} {name}" for key, name in KEYS.items())
    head = f"{datetime.now().astimezone():%H:%M:%S} · by {order} · keys: {keys} · space now · q quit"
    if problem:
        return Text.assemble((f"{head}\n\n", "dim"), ("Error: ", "bold red"), problem)
    return picture(console, lambda sheet: moment.draw(sheet, order, console.height), head)
