"""Job document, as `job --json`, the API and the page show it: its row, its attempts, its call, and why it waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery_capacity.platform.console.job_ids import unknown_jobs, whole_ids
from celery_capacity.routing.model.states import State

if TYPE_CHECKING:
    from celery_capacity.routing.inspect.explanation import Explanation
    from celery_capacity.routing.store.queries import JobFile
    from celery_capacity.workers.process.stores import Stores


@dataclass(frozen=True, slots=True)
class JobDocument:
    """A job with its attempts, the reason why it waits, and the texts of its arguments, its sender and its result."""

    file: JobFile
    why: Explanation | None
    call: dict[str, str | None]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `job --json` prints: texts whole, with secrets hidden."""
        return {**self.file.to_json(), **_hidden(self.call), "why": None if self.why is None else self.why.to_json()}


def read(stores: Stores, app: Callable[[], Any], job_id: str) -> JobDocument:
    """Read a job by its id or the beginning of it. Raises `UnknownJob`.

    `app`: returns the app whose backend has the result.
    """
    from celery_capacity.routing.forecast import starts
    from celery_capacity.routing.inspect import explain
    from celery_capacity.routing.ledger.connection import quick_client
    from celery_capacity.routing.store import queries

    (job,) = whole_ids(stores.engine, [job_id])
    with stores.engine.connect() as connection:
        if (file := queries.find(connection, job)) is None:
            raise unknown_jobs(connection, [job])  # it went meanwhile
        settings, client = stores.settings, quick_client(stores.redis)
        rules = starts.rules_of(settings)
        ttl, halves_in = settings.worker_ttl, settings.share_halves_in
        why = explain.explain(client, connection, job, settings.most_losses, rules, ttl, halves_in)
        call = _call(queries.find_message(connection, job))
    call["result"] = _result(app(), job) if file.job["state"] == State.SUCCEEDED else None
    return JobDocument(file, why, call)


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
