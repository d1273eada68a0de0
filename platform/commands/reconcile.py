"""`celery -A platform reconcile`: make Redis equal Postgres, and say what differed."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.workers.display.progress_bar import command_bar
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "reconcile",
    cls=Command,
    examples=(
        ("Compare and repair, and say what differed", "celery -A platform reconcile"),
        ("The same for a program", "celery -A platform reconcile --json"),
    ),
    codes={
        Exit.OK: "nothing differed, or all was repaired",
        Exit.FAILED: "not all was repaired; another pass may do it",
    },
)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Apply what the ledger noted and Postgres does not have, compare both ways, and repair.

    Beat does this every 300 s; by hand it is harmless at any time. A ledger that is cold is opened first.
    """
    from celery_capacity.platform.console import render
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.controls import reconcile_stores

    stores = stores_of(context)
    with command_bar("compared jobs") as bar:
        done, rebuilt = reconcile_stores(stores, commanding(), bar.show)
    if as_json:
        opened = None
        if rebuilt is not None:
            counts = {"workers": rebuilt.workers, "held": rebuilt.held, "filed": rebuilt.filed}
            opened = {"epoch": rebuilt.epoch, **counts}
        print_json({**done.to_json(), "all_repaired": done.all_repaired, "rebuilt": opened})
    else:
        render.reconciled(facts(), done, rebuilt)
    context.exit(Exit.OK if done.all_repaired else Exit.FAILED)
