"""`celery -A platform cordon`: admit nothing more to workers, while what runs there goes on."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.held_back import LATER, by_option, reason_option, sentence
from celery_capacity.platform.console.names import complete_worker
from celery_capacity.platform.console.terminal import facts, print_json, talk
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "cordon",
    cls=Command,
    examples=(
        ("A machine that is to be looked at", 'celery -A platform cordon render-03 --reason "fan is loud"'),
        ("Several", "celery -A platform cordon render-03 render-04"),
    ),
    codes={Exit.FAILED: "there is no such worker"},
)
@click.argument("workers", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_worker)
@reason_option
@by_option
@json_option
@click.pass_context
def command(
    context: click.Context, workers: tuple[str, ...], reason: str | None, by: str | None, as_json: bool
) -> None:
    """Admit nothing more to these workers. What runs there goes on.

    The cordon stays when the worker is started again, and when Redis is emptied, until `uncordon`. A worker that is
    draining is only cordoned from then on.
    """
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.controls import cordon

    orders = cordon(stores_of(context), commanding(by), workers, reason=reason)
    if as_json:
        print_json([order.to_json() for order in orders])
        return
    for order in orders:
        facts().print(f"{order.worker}  {sentence(order)}")
    if not all(order.applied for order in orders):
        talk().print(LATER)
