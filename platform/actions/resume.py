"""`celery -A platform resume`: start the platform, a queue, a task or a tenant again."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.held_back import LATER, by_option
from celery_capacity.platform.console.names import complete_task
from celery_capacity.platform.console.terminal import facts, print_json, talk
from celery_capacity.platform.console.text_type import Text
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "resume",
    cls=Command,
    examples=(
        ("A queue", "celery -A platform resume --queue render"),
        ("A task", "celery -A platform resume --task tasks.charge"),
        ("A tenant", "celery -A platform resume --tenant physics"),
        ("Everything", "celery -A platform resume"),
    ),
    codes={Exit.FAILED: "that was not paused"},
)
@click.option("--queue", metavar="NAME", type=Text(), help="Jobs of this queue.")
@click.option(
    "--task", metavar="NAME", type=Text(), shell_complete=complete_task, help="Jobs of this task, by its whole name."
)
@click.option("--tenant", metavar="NAME", type=Text(), help="Jobs of this tenant.")
@by_option
@json_option
@click.pass_context
def command(
    context: click.Context, queue: str | None, task: str | None, tenant: str | None, by: str | None, as_json: bool
) -> None:
    """Start a queue, a task, a tenant or the whole platform again. Workers with room are filled at once.

    Each pause is taken back by itself: `resume` alone leaves paused what was paused by its name.
    """
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.controls import resume
    from celery_capacity.routing.policy.pauses import Scope

    order = resume(stores_of(context), commanding(by), Scope.of(queue, task, tenant))
    if as_json:
        print_json(order.to_json())
    else:
        facts().print(f"resumed: {order.scope}" if order.before else f"was not paused: {order.scope}")
        if not order.applied:
            talk().print(LATER)
    raise SystemExit(Exit.OK if order.before else Exit.FAILED)
