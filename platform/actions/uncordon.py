"""`celery -A platform uncordon`: admit jobs to workers again that were cordoned or drained."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.held_back import LATER, by_option, sentence
from celery_capacity.platform.console.names import complete_worker
from celery_capacity.platform.console.terminal import facts, print_json, talk
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "uncordon",
    cls=Command,
    examples=(("After the repair", "celery -A platform uncordon render-03"),),
    codes={Exit.FAILED: "there is no such worker"},
)
@click.argument("workers", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_worker)
@by_option
@json_option
@click.pass_context
def command(context: click.Context, workers: tuple[str, ...], by: str | None, as_json: bool) -> None:
    """Admit jobs to these workers again, and at once those that wait and fit. It ends a drain, too."""
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.controls import uncordon

    orders = uncordon(stores_of(context), commanding(by), workers)
    if as_json:
        print_json([order.to_json() for order in orders])
        return
    for order in orders:
        facts().print(f"{order.worker}  {sentence(order)}")
    if not all(order.applied for order in orders):
        talk().print(LATER)
