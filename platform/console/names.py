"""Names of tasks and workers as people type them: completed by the shell, and unknown ones refused with the nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from celery_capacity.platform.console.command import problem_of_store
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.states import State

if TYPE_CHECKING:
    import click
    from sqlalchemy import Connection

#: Newest jobs of each state whose tasks are known although no worker declared them.
EXAMINED: Final = 2000
#: Names that an error offers.
SHOWN_NAMES: Final = 3
#: Names that the completion of a shell offers.
COMPLETED: Final = 200

_TASKS: Final = """
SELECT DISTINCT newest.name FROM unnest(CAST(:states AS text[])) AS s (state) CROSS JOIN LATERAL (
  SELECT name FROM jobs WHERE jobs.state = s.state ORDER BY seq DESC LIMIT :examined
) AS newest
"""


def is_like(name: str, pattern: str) -> bool:
    """Return whether a name is like a pattern, in which `*` stands for any text."""
    return fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]"))


def task_names(connection: Connection) -> list[str]:
    """Return the tasks that workers declared, and those of the newest jobs, by name."""
    from sqlalchemy import text

    from celery_capacity.routing.store import queries
    from celery_capacity.routing.store.worker_rows import declarations

    declared = declarations(connection) if queries.may_read(connection, "declarations") else {}
    values = {"states": [state.value for state in State], "examined": EXAMINED}
    return sorted({*declared, *connection.execute(text(_TASKS), values).scalars()})


def check_task(connection: Connection, task: str) -> None:
    """Raise `InvalidRequest` for a task that is unknown. A pattern with `*` may match no task yet."""
    if "*" in task:
        return
    names = task_names(connection)
    if task not in names:
        near = get_close_matches(task, names, n=SHOWN_NAMES, cutoff=0.5)
        advice = f"The nearest: {', '.join(near)}." if near else "`celery -A platform stats` lists the tasks."
        raise InvalidRequest(f"no worker has declared the task {task}, and no job is of it", value=task, advice=advice)


def complete_task(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return names of tasks for the completion of a shell; none without stores."""
    return _complete(task_names, incomplete)


def complete_worker(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return names of workers for the completion of a shell; none without stores."""
    from celery_capacity.workers.client.controls import worker_names

    return _complete(worker_names, incomplete)


def _complete(read: Callable[[Connection], Sequence[str]], incomplete: str) -> list[str]:
    from celery_capacity.workers.process.stores import Stores

    try:
        with Stores().engine.connect() as connection:
            names = read(connection)
    except Exception as error:
        if problem_of_store(error) is None:
            raise
        return []  # a shell has no place for a message
    return [name for name in names if name.startswith(incomplete) and name.isprintable()][:COMPLETED]
