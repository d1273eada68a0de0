"""`celery -A platform cancel`: cancel jobs for good, and say what became of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from celery_capacity.platform.actions.choosing import check_choice, choose, is_empty, report, yes_option
from celery_capacity.platform.console.command import Command, json_option, stores_of_app
from celery_capacity.platform.console.job_ids import complete_id
from celery_capacity.platform.console.names import complete_task
from celery_capacity.platform.console.terminal import talk
from celery_capacity.platform.console.text_type import Text
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery_capacity.workers.client.cancel import Cancellation

#: States in which a job can be cancelled.
ACTIVE: Final = [state.value for state in State if state not in FINAL]
_AFTER: Final = "no attempt follows"


@click.command(
    "cancel",
    cls=Command,
    examples=(
        ("One job, or several", "celery -A platform cancel e4855c54 26d33879-a5f1"),
        ("All jobs of a task that have not ended", "celery -A platform cancel --task tasks.render"),
        ("What waits, without a question", "celery -A platform cancel --state waiting --yes"),
        (
            "Running jobs too, at once",
            "celery -A platform cancel --group 9d2f0c6e-6c0f-4a3e-8f0e-3f2f9f1d2a55 --terminate",
        ),
    ),
    codes={Exit.FAILED: "a job had ended before; there is no such job; no job matches; or you said no"},
)
@click.argument("jobs", metavar="[ID...]", nargs=-1, shell_complete=complete_id)
@click.option(
    "--task",
    metavar="NAME",
    type=Text(),
    shell_complete=complete_task,
    help="All jobs of this task that have not ended; * is any text.",
)
@click.option("--group", metavar="ID", type=Text(), help="All jobs of this group, chord or workflow.")
@click.option("--state", metavar="STATE", type=click.Choice(ACTIVE), help="All jobs in this state.")
@click.option("--terminate", is_flag=True, help="End the processes of running jobs.")
@yes_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    jobs: tuple[str, ...],
    task: str | None,
    group: str | None,
    state: str | None,
    terminate: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Cancel jobs for good: the jobs with these IDs, or all jobs that match the options.

    The first four characters of an id, or more, stand for it if no other id begins so.

    A job that has not started ends at once. A running job goes on to its end, and no other attempt follows;
    --terminate ends its process. A job in a thread (--pool threads) cannot be ended. Jobs that are chosen by options
    are counted first, and you are asked.
    """
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.jobs import cancel
    from celery_capacity.workers.client.cancel import Became, matching

    filters = {"--task": task, "--group": group, "--state": state}
    used = [name for name, value in filters.items() if value is not None]
    check_choice(jobs, used)
    stores = stores_of_app(context)
    ids = choose(stores, jobs, lambda: matching(stores, task=task, group=group, state=state), "Cancel", yes)
    chosen = {"task": task, "group": group, "state": state}
    app = context.obj.app
    cancellations = cancel(app, stores, commanding(), ids, terminate=terminate, chosen=chosen) if ids else ()
    results = report(cancellations, lambda cancellation: _sentence(cancellation, terminate), as_json, len(ids))
    if not as_json and any(cancellation.became is Became.CANNOT_TERMINATE for cancellation in results):
        talk().print("Only a pool of processes (--pool prefork) can end a running job.")
    done = all(cancellation.done for cancellation in results) and not is_empty(results, task, group)
    raise SystemExit(Exit.OK if done else Exit.FAILED)


def _sentence(cancellation: Cancellation, terminate: bool) -> str:
    from celery_capacity.workers.client.cancel import Became

    worker, state = cancellation.worker or "a worker", cancellation.state.value
    more = f"{worker} did not answer" if terminate else "--terminate ends it"
    return {
        Became.CANCELLED: "cancelled",
        Became.RUNS_ON: f"is {state} on {worker}: it goes on to its end, {_AFTER}; {more}",
        Became.TERMINATING: f"is being ended on {worker}",
        Became.CANNOT_TERMINATE: f"runs on {worker}, which has no process of its own for it: it goes on, {_AFTER}",
        Became.ENDED_BEFORE: f"had ended: {state}",
        Became.MARKED: "is marked: it starts no more, and ends as soon as its store answers",
    }[cancellation.became]
