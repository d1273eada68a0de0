"""Tables of the backlog and of tasks: plain and whole for a pipe, with bars and cut to the screen on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from celery_capacity.platform.console.fitting import fit, shorten_end
from celery_capacity.platform.console.render import age, table_with_bars
from celery_capacity.platform.console.terminal import NOTHING, harmless
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, format_memory
from celery_capacity.routing.model.request import Request, alternatives_text
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT

if TYPE_CHECKING:
    from rich.console import Console

#: Columns that a row of the backlog keeps for its bar and the spaces around it.
BAR_ROOM: Final = 12
#: Fewest columns of a reason on a terminal.
SHORTEST_WHY: Final = 24
#: Columns of the figures of tasks that a narrow terminal leaves out, the first of them first.
LESS_ASKED: Final = ("memory", "CPUs")
#: Columns of the backlog that may be narrower than their content on a terminal, with the fewest characters of each.
ELASTIC: Final = {"task": 12, "request": 12, "queue": 6, "tenant": 6}


def backlog(console: Console, groups: Sequence[Mapping[str, Any]], waiting: int) -> None:
    """Print a line for each group of waiting jobs, with the reason of its first job."""
    if not groups:
        console.print("no job waits" if not waiting else f"{waiting} jobs are about to start")
        return
    columns = {
        "waiting": [str(group["waiting"]) for group in groups],
        "task": [harmless(group["task"]) for group in groups],
        "request": [_request(group) for group in groups],
        "queue": [harmless(group["queue"]) for group in groups],
        "tenant": [harmless(group["tenant"]) for group in groups],
        "priority": [str(group["priority"]) for group in groups],
        "oldest": [age(group["oldest_seconds"]) for group in groups],
        "starts": [_clock(group["estimated_start"]) for group in groups],
    }
    for name, usual in (("queue", DEFAULT_QUEUE), ("tenant", DEFAULT_TENANT), ("priority", "0"), ("starts", NOTHING)):
        if all(cell == usual for cell in columns[name]):
            del columns[name]
    whys = [harmless(" ".join(group["reasons"][:1])) or NOTHING for group in groups]
    if console.is_terminal:
        least = min(max(map(len, whys)), max(SHORTEST_WHY, console.width // 2))
        columns = fit(columns, console.width - BAR_ROOM - least, ELASTIC, dispensable=())
        used = sum(max(len(name), *map(len, cells)) + 2 for name, cells in columns.items())
        whys = [shorten_end(why, max(SHORTEST_WHY, console.width - BAR_ROOM - used)) for why in whys]
    columns["why"] = whys
    meters = {0: [(group["waiting"], sum(other["waiting"] for other in groups)) for group in groups]}
    right = [number for number, name in enumerate(columns) if name in ("waiting", "priority", "oldest")]
    table_with_bars(console, list(columns), list(zip(*columns.values(), strict=True)), meters, right)


def _request(group: Mapping[str, Any]) -> str:
    return alternatives_text([Request.from_people(it) for it in group["alternatives"] or [group["request"]]])


def _clock(start: str | None) -> str:
    return NOTHING if start is None else datetime.fromisoformat(start).astimezone().strftime("%H:%M:%S")


def statistics(console: Console, figures: Mapping[str, Any]) -> None:
    """Print a line for each task, on a terminal with its share of failures as a bar.

    `CPUs` and `memory` are those that its jobs ask for. Where the screen has no room for them, they are left out.
    """
    tasks = figures["tasks"]
    if not tasks:
        console.print("no jobs")
        return
    columns = {
        "task": [harmless(task["name"]) for task in tasks],
        **{name: [str(task[name]) for task in tasks] for name in ("jobs", "waiting", "running", "succeeded", "failed")},
        "failed %": [NOTHING if task["failure_percent"] is None else f"{task['failure_percent']:g}" for task in tasks],
        **{
            f"{what} {rank}": [age(task[f"{what}_{rank}_seconds"]) for task in tasks]
            for what in ("wait", "run")
            for rank in ("p50", "p95")
        },
        "CPUs": [_range(*(f"{task[f'cpus_{end}']:g}" for end in ("least", "most"))) for task in tasks],
        "memory": [_range(*(_memory(task[f"memory_{end}"]) for end in ("least", "most"))) for task in tasks],
    }
    if console.is_terminal:
        columns = fit(columns, console.width - BAR_ROOM, {"task": 12}, LESS_ASKED)
    ended = [(task["failed"], task["failed"] + task["succeeded"]) for task in tasks]
    rows = list(zip(*columns.values(), strict=True))
    meters = {list(columns).index("failed %"): ended}
    table_with_bars(console, list(columns), rows, meters, right=range(1, len(columns)))
    if figures["sample"] >= figures["limit"]:
        console.print(f"over the newest {figures['limit']:,} jobs")


def _range(least: str, most: str) -> str:
    """Return what jobs of a task ask for: "4", or "1 to 4"."""
    return least if least == most else f"{least} to {most}"


def _memory(size: int) -> str:
    return format_memory(size) if size else NOTHING
