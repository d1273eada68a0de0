"""`celery -A platform backlog`: what waits, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.names import check_task, complete_task
from celery_capacity.platform.console.terminal import print_json
from celery_capacity.platform.console.text_type import Text
from celery_capacity.platform.console.watch import show, watch_option
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console


class ReasonWord(click.ParamType):  # type: ignore[type-arg]
    """Word of a reason to wait. The reasons are looked up late: the help needs no client of Redis."""

    name = "reason"

    @staticmethod
    def _choice() -> click.Choice[str]:
        from celery_capacity.routing.model.reasons import EXPLAINED, Reason

        return click.Choice([reason.value for reason in EXPLAINED if reason not in (Reason.RUNS, Reason.ENDED)])

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        """Return a known word. Fails for another one, and names all."""
        return self._choice().convert(value, parameter, context)

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the words that begin so."""
        return self._choice().shell_complete(context, parameter, incomplete)


@click.command(
    "backlog",
    cls=Command,
    examples=(
        ("What waits, in groups, each with its reason", "celery -A platform backlog"),
        ("The same again every 5 s", "celery -A platform backlog --watch 5"),
        ("What waits for room, of a module's tasks", "celery -A platform backlog --task 'video.*' --reason no-room"),
        ("The same for a program", "celery -A platform backlog --json"),
    ),
    codes={Exit.FAILED: "there is no such task; the nearest are named"},
)
@click.option(
    "--task", metavar="NAME", type=Text(), shell_complete=complete_task, help="Only jobs of this task; * is any text."
)
@click.option("--queue", metavar="NAME", type=Text(), help="Only jobs of this queue; * is any text.")
@click.option("--tenant", metavar="NAME", type=Text(), help="Only jobs of this tenant.")
@click.option("--reason", metavar="WHY", type=ReasonWord(), help="Only groups that wait for this reason.")
@watch_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    task: str | None,
    queue: str | None,
    tenant: str | None,
    reason: str | None,
    watch: float | None,
    as_json: bool,
) -> None:
    """List what waits, in groups of jobs alike in task, request, queue, priority and tenant.

    Groups that no worker can ever take stand first. The reason and the estimated start are those of the first job of a
    group. `job ID` says more about one job.

    WHY is the word of a reason in the JSON, such as no-room or no-worker-knows-task. A group must meet all conditions.
    """
    from celery_capacity.platform.console import held_back
    from celery_capacity.platform.monitor import tables
    from celery_capacity.platform.web import group_rows, waiting_groups
    from celery_capacity.routing.inspect import overview
    from celery_capacity.routing.ledger.connection import quick_client

    stores = stores_of(context)
    settings, client = stores.settings, quick_client(stores.redis)
    chosen = group_rows.GroupFilter(task, queue, tenant, reason)
    reader = waiting_groups.WaitingGroups()

    def draw(console: Console) -> None:
        seen = overview.read(client, stores.engine, settings.worker_ttl)
        with stores.engine.connect() as connection:
            groups = reader.read(connection, client, settings, chosen)
            if task is not None and not groups:
                check_task(connection, task)
        if as_json:
            print_json(waiting_groups.document(seen.to_json(), groups))
            return
        if reason is not None and reader.unexamined:
            console.print(f"There was no time for the reasons of {reader.unexamined} groups, which are left out.")
        if not groups and chosen != waiting_groups.ALL:
            console.print("no such job waits")
        else:
            tables.backlog(console, groups, seen.waiting)
        held_back.show(console, seen)

    show(draw, watch, "backlog", in_place=not as_json)
