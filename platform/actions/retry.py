"""`celery -A platform retry`: run ended jobs again, as new jobs with the same message and request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_capacity.platform.actions.choosing import check_choice, choose, is_empty, report, yes_option
from celery_capacity.platform.console.command import Command, WrongUsage, exit_code, json_option, stores_of_app
from celery_capacity.platform.console.durations import Since
from celery_capacity.platform.console.job_ids import complete_id
from celery_capacity.platform.console.names import complete_task
from celery_capacity.platform.console.text_type import Text
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery_capacity.platform.operations.jobs import Retried


@click.command(
    "retry",
    cls=Command,
    examples=(
        ("One job, or several", "celery -A platform retry e4855c54 26d33879-a5f1"),
        ("All that failed in the last two hours", "celery -A platform retry --failed --since 2h"),
        ("All that failed of one task", "celery -A platform retry --failed --task tasks.render"),
    ),
    codes={Exit.FAILED: "a job cannot be retried; there is no such job; no job matches; or you said no"},
)
@click.argument("jobs", metavar="[ID...]", nargs=-1, shell_complete=complete_id)
@click.option("--failed", is_flag=True, help="All jobs that failed or were lost.")
@click.option(
    "--task",
    metavar="NAME",
    type=Text(),
    shell_complete=complete_task,
    help="With --failed: only jobs of this task; * is any text.",
)
@click.option("--since", type=Since(), metavar="TIME", help="With --failed: ended since then, such as 2h.")
@click.option("--again", is_flag=True, help="Also jobs that succeeded, or were retried already.")
@yes_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    jobs: tuple[str, ...],
    failed: bool,
    task: str | None,
    since: float | None,
    again: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Run ended jobs again: the jobs with these IDs, or all that failed.

    The first four characters of an id, or more, stand for it if no other id begins so.

    Each becomes a new job with the same message and request, linked to the old one. A job is retried once, unless
    --again says otherwise. Jobs that are chosen by --failed are counted first, and you are asked.
    """
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.jobs import retry_all
    from celery_capacity.workers.client.retry import failed_jobs

    check_choice(jobs, ["--failed"] if failed else [])
    if not failed and (task is not None or since is not None):
        raise WrongUsage("--task and --since choose among failed jobs", advice="Add --failed.")
    stores = stores_of_app(context)
    ids = choose(stores, jobs, lambda: failed_jobs(stores, task, since, again), "Retry", yes)
    chosen = {"task": task, "since_seconds": since} if failed else {}
    retries = retry_all(context.obj.app, stores, commanding(), ids, again=again, chosen=chosen) if ids else ()
    results = report(retries, _sentence, as_json, len(ids))
    refusals = [result.refused for result in results if result.refused is not None]
    if is_empty(results, task):
        raise SystemExit(Exit.FAILED)
    raise SystemExit(exit_code(refusals[-1]) if refusals else Exit.OK)


def _sentence(result: Retried) -> str:
    return f"retried as {result.retried_as}" if result.refused is None else f"not retried: {result.refused}"
