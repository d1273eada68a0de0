"""`celery -A platform verify`: four checks, then the invariants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from platform import checks, exits, render
from platform.edge import answering, json_option, stores_of
from platform.terminal import facts, print_json
from routing import overview, verify
from routing.errors import StoreUnavailable

if TYPE_CHECKING:
    from workers.stores import Stores

__all__ = ["command"]


@click.command("verify")
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Check workers, totals, heartbeats and reads, then the invariants.

    Work may go on meanwhile: what holds only at rest is then named as such. Exit code 0 if all four checks
    pass and the invariants hold, 1 if not.
    """
    with answering(as_json):
        stores = stores_of(context)
        results = checks.run(overview.quick(stores.redis), stores.engine, stores.settings)
        if not as_json:
            _show(results)
        report, why_not = _judge(stores)
    passed = sum(result.passed for result in results)
    good = passed == len(results) and report is not None and report.holds
    if as_json:
        print_json(
            {
                "ok": good,
                "passed": passed,
                "checks": [result.to_json() for result in results],
                "invariants": None if report is None else report.to_json(),
                "not_judged": why_not,
            }
        )
    else:
        console = facts()
        console.print()
        if report is not None:
            render.invariants(console, report)
            console.print()
        console.print(f"{passed}/{len(results)}", soft_wrap=True)
        verdict = f"invariants: NOT JUDGED, {why_not}" if report is None else render.verdict_line(report)
        console.print(verdict, soft_wrap=True)
    context.exit(exits.OK if good else exits.FAILED)


def _judge(stores: Stores) -> tuple[verify.Report | None, str | None]:
    """The invariants, or why they cannot be judged: both stores are needed."""
    try:
        return verify.check(stores.engine, stores.redis), None
    except StoreUnavailable as error:
        return None, error.message


def _show(results: list[checks.Check]) -> None:
    console = facts()
    for number, result in enumerate(results, 1):
        console.print(f"{number} {'ok    ' if result.passed else 'FAILED'} {result.name}", soft_wrap=True)
        console.print(f"         {result.found}", soft_wrap=True)
