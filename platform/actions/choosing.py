"""Shared steps of the commands that act on many jobs: choose the jobs, ask first, and say what became of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from celery_capacity.platform.console.asking import confirm
from celery_capacity.platform.console.command import WrongUsage
from celery_capacity.platform.console.job_ids import whole_ids
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.workers.display.progress_bar import command_bar

if TYPE_CHECKING:
    from celery_capacity.workers.process.stores import Stores

#: Option of a command that asks before it acts on many jobs.
yes_option = click.option("-y", "--yes", "--force", "yes", is_flag=True, help="Do not ask.")


class Result(Protocol):
    """Result of an action for one job."""

    @property
    def job(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Result)


def check_choice(ids: Sequence[str], filters: Sequence[str]) -> None:
    """Raise `WrongUsage` unless the jobs are named by ids or chosen by options, and not both. `filters`: those used."""
    if ids and filters:
        raise WrongUsage(f"ids and {filters[0]} cannot be used together", advice="Name the jobs, or choose them.")
    if not ids and not filters:
        raise WrongUsage("no job is named", advice="Name the jobs by their ids, or choose them by an option.")


def choose(
    stores: Stores, typed: Sequence[str], matching: Callable[[], list[str]], action: str, yes: bool
) -> list[str]:
    """Return the named jobs, else those that match the options, once the user has agreed to the action on so many.

    Raises `UnknownJob`, `InvalidRequest`, `Declined`.
    """
    if typed:
        return whole_ids(stores.engine, typed)
    ids = matching()
    if ids and not yes:
        confirm(f"{action} {len(ids):,} {'job' if len(ids) == 1 else 'jobs'}?")
    return ids


def report(results: Iterable[R], line_of: Callable[[R], str], as_json: bool, total: int) -> list[R]:
    """Print a line for each result as soon as it is there, or as JSON all results at the end; return them.

    `total`: number of results. A bar counts them where their lines do not come on a terminal.
    """
    shown = []
    lines_are_seen = not as_json and facts().is_terminal
    with nullcontext() if lines_are_seen else command_bar("jobs", total) as bar:
        for result in results:
            shown.append(result)
            if not as_json:
                facts().print(f"{result.job}  {line_of(result)}")
            if bar is not None:
                bar.advance()
    if as_json:
        print_json([result.to_json() for result in shown])
    elif not shown:
        facts().print("no jobs")
    return shown


def is_empty(results: Sequence[object], *typed: str | None) -> bool:
    """Return True if a name that a person typed, and may have mistyped, chose no job. `typed`: these filters."""
    return not results and any(name is not None for name in typed)
