"""`celery -A platform verify`: four checks, then the invariants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.text import Text

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.names import complete_worker
from celery_capacity.platform.console.terminal import facts, harmless, print_json
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.workers.display.progress_bar import command_bar
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery_capacity.platform.health_checks import Check
    from celery_capacity.routing.inspect.audit import Progress
    from celery_capacity.routing.inspect.verify import Report
    from celery_capacity.routing.store.quarantine import Quarantined
    from celery_capacity.workers.process.stores import Stores


@click.command(
    "verify",
    cls=Command,
    examples=(
        ("Whether all is well; the last two lines say it", "celery -A platform verify"),
        ("The same for a program", "celery -A platform verify --json"),
        ("Whether this worker is well, as a probe", "celery -A platform verify --worker worker-01"),
    ),
    codes={
        Exit.OK: "all checks pass, and the invariants hold",
        Exit.FAILED: "a check failed, an invariant is broken, or it cannot be judged",
    },
)
@click.option(
    "--worker", metavar="NAME", shell_complete=complete_worker, help="This worker alone, without the invariants."
)
@json_option
@click.pass_context
def command(context: click.Context, worker: str | None, as_json: bool) -> None:
    """Check workers, totals, heartbeats and reads, then the invariants.

    Messages that were set aside are listed by reason. They fail no check.

    Work may go on meanwhile: what holds only at rest is then named as such.

    With --worker: whether that worker is registered and its heartbeat fresh. This reads one key of Redis.
    """
    from celery_capacity.platform import health_checks
    from celery_capacity.platform.console import render
    from celery_capacity.platform.console.estimates import errors_phrase
    from celery_capacity.routing.inspect import overview
    from celery_capacity.routing.ledger.connection import quick_client

    stores = stores_of(context)
    client = quick_client(stores.redis)
    report: Report | None = None
    quarantined: Quarantined | None = None
    why_not: str | None = f"only {worker} was asked about"
    with command_bar("checking"):
        if worker is not None:
            results = health_checks.run_for(client, stores.settings, worker)
        else:
            results = health_checks.run(client, stores.engine, stores.settings)
    if not as_json:
        _show(results)
    if worker is None:
        with command_bar("judging the invariants: jobs") as bar:
            report, why_not = _judge(stores, bar.show)
        quarantined = overview.quarantined(stores.engine)
    passed = sum(result.passed for result in results)
    good = passed == len(results) and (worker is not None or (report is not None and report.holds))
    if as_json:
        print_json(
            {
                "ok": good,
                "passed": passed,
                "checks": [result.to_json() for result in results],
                "invariants": None if report is None else report.to_json(),
                "not_judged": why_not,
                "quarantine": None if quarantined is None else quarantined.to_json(),
            }
        )
    else:
        console = facts()
        console.print()
        if report is not None:
            render.invariants(console, report)
            if report.estimates is not None:
                console.print(f"estimated starts: {errors_phrase(report.estimates)}, of {report.estimates.compared}")
            console.print()
        if quarantined is not None and quarantined.messages:
            render.quarantine(console, quarantined)
            console.print()
        console.print(f"{passed}/{len(results)}")
        if worker is None:
            verdict = f"invariants: NOT JUDGED, {why_not}" if report is None else render.verdict_line(report)
            console.print(verdict, style="green" if good else "bold red")
    context.exit(Exit.OK if good else Exit.FAILED)


def _judge(stores: Stores, progress: Progress) -> tuple[Report | None, str | None]:
    """Return the invariants, or why they cannot be judged: both stores are needed."""
    from celery_capacity.routing.database import deadlines
    from celery_capacity.routing.inspect import verify

    try:
        with deadlines.patiently(stores.settings.store_timeout * deadlines.LONG):
            seconds = stores.settings.write_within
            return verify.check(stores.engine, stores.redis, write_within=seconds, progress=progress), None
    except StoreUnavailable as error:
        return None, error.message


def _show(results: list[Check]) -> None:
    console = facts()
    for number, result in enumerate(results, 1):
        word = Text("ok    ", "green") if result.passed else Text("FAILED:" if result.failure else "FAILED", "bold red")
        console.print(Text.assemble(f"{number} ", word, f" {harmless(result.statement)}"))
        console.print(f"         {result.finding}")
