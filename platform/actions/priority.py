"""`celery -A platform priority`: give jobs that wait or run another priority."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from celery_capacity.platform.actions.choosing import report
from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.held_back import by_option, reason_option
from celery_capacity.platform.console.job_ids import complete_id, whole_ids
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery_capacity.workers.client.priorities import Reprioritized


#: The highest priority, as `routing.policy.placement.TOP_PRIORITY`.
HIGHEST: Final = 9


@click.command(
    "priority",
    cls=Command,
    examples=(
        ("One job before all others", "celery -A platform priority e4855c54 9"),
        ("Several", 'celery -A platform priority e4855c54 26d33879-a5f1 7 --reason "the customer calls"'),
    ),
    codes={Exit.FAILED: "a job had ended before, or there is no such job"},
)
@click.argument("jobs", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)
@click.argument("priority", metavar="N", type=click.IntRange(0, HIGHEST))
@reason_option
@by_option
@json_option
@click.pass_context
def command(
    context: click.Context, jobs: tuple[str, ...], priority: int, reason: str | None, by: str | None, as_json: bool
) -> None:
    """Give jobs the priority N, from 0 to 9; 9 comes first.

    A waiting job has its new place at once. A running job goes on, and its next attempt has the priority. Retries keep
    it. The first four characters of an id, or more, stand for it if no other id begins so.
    """
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.jobs import set_priority
    from celery_capacity.workers.client.priorities import Became

    stores = stores_of(context)
    ids = whole_ids(stores.engine, jobs)
    results = report(set_priority(stores, commanding(by), ids, priority, reason=reason), _sentence, as_json, len(ids))
    ended = any(result.became is Became.ENDED_BEFORE for result in results)
    raise SystemExit(Exit.FAILED if ended else Exit.OK)


def _sentence(result: Reprioritized) -> str:
    from celery_capacity.workers.client.priorities import Became

    if result.became is Became.ENDED_BEFORE:
        return f"had ended: {result.state.value}; to run it again: celery -A platform retry {result.job}"
    changed = f"priority {result.priority}, before {result.before}"
    if result.became is Became.NEXT_ATTEMPT:
        return f"{changed}: it is {result.state.value}, and its next attempt has the new one"
    return changed
