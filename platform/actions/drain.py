"""`celery -A platform drain`: let workers become empty, for maintenance or before they end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.durations import Duration
from celery_capacity.platform.console.held_back import LATER, by_option, reason_option, sentence
from celery_capacity.platform.console.names import complete_worker
from celery_capacity.platform.console.terminal import Meter, Meters, facts, print_json, talk
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery_capacity.workers.process.stores import Stores

#: Seconds between two looks at a draining worker.
LOOK: Final = 0.25
#: Looks in a row that find nothing, after which a worker is empty. Postgres hears a moment later of a job that the
#: ledger admitted just before the drain.
LOOKS: Final = 2


@click.command(
    "drain",
    cls=Command,
    examples=(
        ("Until what runs there has ended", "celery -A platform drain render-03 --wait"),
        ("At most ten minutes, then reboot", "celery -A platform drain render-03 --deadline 10m --wait && reboot"),
        ("And end the worker", 'celery -A platform drain render-03 --deadline 10m --stop --reason "new disk"'),
    ),
    codes={Exit.FAILED: "there is no such worker", Exit.TIMED_OUT: "with --timeout: jobs still run there"},
)
@click.argument("workers", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_worker)
@click.option("--deadline", type=Duration(), metavar="TIME", help="Hand back after that what still runs, such as 10m.")
@click.option("--stop", is_flag=True, help="End the worker's process once it is empty.")
@click.option("--wait", is_flag=True, help="Wait until the workers are empty, or with --stop have ended.")
@click.option("--timeout", type=Duration(), metavar="TIME", help="With --wait: wait no longer than that.")
@reason_option
@by_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    workers: tuple[str, ...],
    deadline: float | None,
    stop: bool,
    wait: bool,
    timeout: float | None,
    reason: str | None,
    by: str | None,
    as_json: bool,
) -> None:
    """Admit nothing more to these workers, and let them become empty.

    Running jobs end by themselves. What still runs at the --deadline is broken off and handed back: it starts anew on
    another worker, and that attempt does not count as lost. A job in a thread (--pool threads) cannot be broken off,
    unless --stop ends the process. The worker stays registered, empty and cordoned, until `uncordon`.
    """
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.controls import drain

    stores = stores_of(context)
    orders = drain(stores, commanding(by), workers, reason=reason, deadline=deadline, stops=stop)
    if not as_json:
        for order in orders:
            facts().print(f"{order.worker}  {sentence(order)}")
        if not all(order.applied for order in orders):
            talk().print(LATER)
    left = _wait(stores, [order.worker for order in orders], stop, timeout) if wait else {}
    if as_json:
        # The number of running jobs is that of the end of the wait.
        print_json([{**order.to_json(), **({"running": left[order.worker]} if wait else {})} for order in orders])
    elif wait:
        for name, number in left.items():
            facts().print(f"{name}  {'empty' if not number else f'{number} still run there'}")
    raise SystemExit(Exit.TIMED_OUT if any(left.values()) else Exit.OK)


def _wait(stores: Stores, names: Sequence[str], stop: bool, timeout: float | None) -> dict[str, int]:
    """Wait until the workers are empty, with `stop` until they have ended; return the jobs that still run there."""
    from celery_capacity.workers.client.controls import standing

    end = None if timeout is None else time.monotonic() + timeout
    most, empty = dict.fromkeys(names, 1), 0
    with Meters(talk()) as meters:
        while True:
            with stores.engine.connect() as connection:
                now = standing(connection, names, stores.settings.worker_ttl)
            running = {name: jobs + (stop and live and not jobs) for name, (live, jobs) in now.items()}
            most = {name: max(most[name], now[name][1]) for name in names}
            meters.show([Meter(name, most[name] - now[name][1], most[name], f"{now[name][1]} run") for name in names])
            empty = 0 if any(running.values()) else empty + 1
            if empty == LOOKS or (end is not None and time.monotonic() >= end):
                return {name: int(number) for name, number in running.items()}
            time.sleep(LOOK)
