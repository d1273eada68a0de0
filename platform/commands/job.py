"""`celery -A platform job ID`: one job, and why it waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.job_ids import complete_id, unknown_jobs, whole_ids
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.routing.model.states import State
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    pass


@click.command(
    "job",
    cls=Command,
    examples=(
        ("What happened to it, and why it waits", "celery -A platform job e4855c54"),
        ("The same for a program", "celery -A platform job e4855c54-e3fb-4f71-a177-e89ef6cfe2d5 --json"),
    ),
    codes={Exit.FAILED: "there is no such job; the nearest ids are named"},
)
@click.argument("job_id", metavar="ID", shell_complete=complete_id)
@json_option
@click.pass_context
def command(context: click.Context, job_id: str, as_json: bool) -> None:
    """Show one job: what happened to it, and why it waits.

    ID is the id of the Celery task, or its first four characters or more, as `jobs` shows them.
    """
    from celery_capacity.platform.console import job_views
    from celery_capacity.routing.forecast import starts
    from celery_capacity.routing.inspect import explain
    from celery_capacity.routing.ledger.connection import quick_client
    from celery_capacity.routing.store import queries

    stores = stores_of(context)
    (job,) = whole_ids(stores.engine, [job_id])
    with stores.engine.connect() as connection:
        if (file := queries.find(connection, job)) is None:
            raise unknown_jobs(connection, [job])  # it went meanwhile
        settings, client = stores.settings, quick_client(stores.redis)
        rules = starts.rules_of(settings)
        ttl, halves_in = settings.worker_ttl, settings.share_halves_in
        why = explain.explain(client, connection, job, settings.most_losses, rules, ttl, halves_in)
        call = _call(queries.find_message(connection, job))
    call["result"] = _result(context.obj.app, job) if file.job["state"] == State.SUCCEEDED else None
    if as_json:
        print_json({**file.to_json(), **_hidden(call), "why": None if why is None else why.to_json()})
    else:
        job_views.job(facts(), file, why, call)


def _call(message: bytes | None) -> dict[str, str | None]:
    """Return what a message tells of its call: the sender, and the texts of the arguments, which a task may hide."""
    from celery_capacity.routing.model.message import decode

    headers = {} if message is None else decode(message).get("headers") or {}
    names = {"args": "argsrepr", "kwargs": "kwargsrepr", "sender": "origin"}
    return {name: headers[header] if isinstance(headers.get(header), str) else None for name, header in names.items()}


def _result(app: Any, job: str) -> str | None:
    """Return the result of a job that succeeded, as text; None where none is kept."""
    from celery_capacity.routing.config.redaction import hidden

    try:
        backend = app.backend
        # This process only looks: the backend of an app that submits would try for minutes.
        backend.always_retry = False
        meta = backend.get_task_meta(job)
    except Exception as error:  # of whichever backend the app has
        return f"not available: {error}"
    return repr(hidden(meta.get("result"))) if meta.get("status") == "SUCCESS" else None


def _hidden(call: dict[str, str | None]) -> dict[str, str | None]:
    """Return the texts for a program: whole, with secrets hidden."""
    from celery_capacity.routing.config.redaction import hidden_text

    return {name: None if text is None else hidden_text(text) for name, text in call.items()}
