"""`celery -A platform pause`: start nothing more of the platform, a queue, a task or a tenant."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.held_back import LATER, by_option, paused, reason_option
from celery_capacity.platform.console.names import complete_task
from celery_capacity.platform.console.terminal import facts, print_json, talk
from celery_capacity.platform.console.text_type import Text


@click.command(
    "pause",
    cls=Command,
    examples=(
        ("A queue", 'celery -A platform pause --queue render --reason "licence server is down"'),
        ("A task", "celery -A platform pause --task tasks.charge"),
        ("A tenant", "celery -A platform pause --tenant physics"),
        ("Everything", "celery -A platform pause"),
    ),
)
@click.option("--queue", metavar="NAME", type=Text(), help="Jobs of this queue; that without a name is called celery.")
@click.option(
    "--task", metavar="NAME", type=Text(), shell_complete=complete_task, help="Jobs of this task, by its whole name."
)
@click.option("--tenant", metavar="NAME", type=Text(), help="Jobs of this tenant.")
@reason_option
@by_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    queue: str | None,
    task: str | None,
    tenant: str | None,
    reason: str | None,
    by: str | None,
    as_json: bool,
) -> None:
    """Start nothing more of a queue, a task, a tenant, or the whole platform.

    Submissions are accepted and wait, with the reason `paused`. Running jobs go on to their ends. The pause stays when
    workers are started again and when Redis is emptied, until `resume`.
    """
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.controls import pause
    from celery_capacity.routing.policy.pauses import Scope

    order = pause(stores_of(context), commanding(by), Scope.of(queue, task, tenant), reason=reason)
    if as_json:
        print_json(order.to_json())
        return
    facts().print(f"resumed meanwhile: {order.scope}" if order.pause is None else paused(order.pause))
    if not order.applied:
        talk().print(LATER)
