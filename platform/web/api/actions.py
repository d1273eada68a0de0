"""Actions of operators below `/api/v1`, and the audit of them. Each calls the function of the command's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from starlette.responses import Response

from celery_capacity.platform.console.job_ids import whole_ids
from celery_capacity.platform.documents.actions import Cancelled, Moved, RetryResult
from celery_capacity.platform.documents.checks import Reconciled
from celery_capacity.platform.documents.orders import OrderedWorker, PausedPart
from celery_capacity.platform.operations import controls, jobs, submitting
from celery_capacity.platform.operations.submitting import Submission
from celery_capacity.platform.web.api import action_models as models
from celery_capacity.platform.web.api.action_models import MAX_MANY
from celery_capacity.platform.web.api.filters import Cursor, Limit
from celery_capacity.platform.web.api.routes import answers, json_answer, reads
from celery_capacity.platform.web.http.login import Login, Role
from celery_capacity.platform.web.http.problems import NotAllowed, NotConfirmed, wrong_parameter
from celery_capacity.platform.web.sources import PAGE, Sources
from celery_capacity.routing.database.audit import Actor, Way
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.identifiers import MAX_JOB_ID, MAX_WORKER_NAME
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.store.controls import MAX_OPERATOR, tidy
from celery_capacity.workers.client.cancel import matching
from celery_capacity.workers.client.retry import failed_jobs

JobId = Annotated[str, Path(max_length=MAX_JOB_ID, description="an id")]
WorkerName = Annotated[str, Path(max_length=MAX_WORKER_NAME)]


def _actor(request: Request) -> Actor:
    """Return who acts. The guard has looked at the token before; on a server without a token nobody acts."""
    login: Login | None = request.app.state.login
    if login is None or login.shown_role(request.headers) is not Role.OPERATOR:
        raise NotAllowed()
    return actor_of(request, Way.API)


def actor_of(request: Request, way: Way) -> Actor:
    """Return the name of an operator: the user that a trusted proxy named, else the role and the address."""
    header: str | None = request.app.state.user_header
    user = tidy(request.headers.get(header, ""), MAX_OPERATOR) if header else None
    address = request.client.host if request.client else "unknown"
    return Actor(user or f"operator@{address}", way)


Operator = Annotated[Actor, Depends(_actor)]


def add_actions(app: FastAPI, sources: Sources, login: Login | None, user_header: str | None) -> None:
    """Add the actions. `user_header`: the header in which a trusted proxy names who acts."""
    app.state.login, app.state.user_header = login, user_header
    router = APIRouter(prefix="/api/v1", tags=["act"])
    _add_jobs(router, sources)
    _add_many(router, sources)
    _add_workers(router, sources)
    _add_parts(router, sources)
    _add_submissions(router, sources)
    _add_audit(router, sources)
    app.include_router(router)


def _results(results: Sequence[Any]) -> Response:
    return json_answer({"results": [result.to_json() for result in results]})


def _add_jobs(router: APIRouter, sources: Sources) -> None:
    @router.post("/jobs/{job_id}/cancel", **answers(models.Results[Cancelled]))
    def cancel(job_id: JobId, by: Operator, body: models.Cancel | None = None) -> Response:
        """Cancel a job for good. A running one goes on to its end, unless `terminate` ends its process."""
        app, stores = sources.acting()
        ids = whole_ids(stores.engine, [job_id], exact=True)
        return _results(list(jobs.cancel(app, stores, by, ids, terminate=body is not None and body.terminate)))

    @router.post("/jobs/{job_id}/retry", **answers(models.Results[RetryResult]))
    def retry(job_id: JobId, by: Operator, body: models.Retry | None = None) -> Response:
        """Run an ended job again, as a new job with the same message and request."""
        app, stores = sources.acting()
        ids = whole_ids(stores.engine, [job_id], exact=True)
        (result,) = jobs.retry_all(app, stores, by, ids, again=body is not None and body.again)
        if result.refused is not None:
            raise result.refused
        return _results([result])

    @router.post("/jobs/{job_id}/priority", **answers(models.Results[Moved]))
    def priority(job_id: JobId, by: Operator, body: models.Priority) -> Response:
        """Give a job another priority: a waiting one has its new place at once, a running one at its next attempt."""
        _, stores = sources.acting()
        ids = whole_ids(stores.engine, [job_id], exact=True)
        return _results(jobs.set_priority(stores, by, ids, body.priority, reason=body.reason))


def check_confirmed(ids: Sequence[str], confirm: int | None) -> None:
    """Raise `NotConfirmed` unless a request knows how many jobs it acts on, and `InvalidRequest` if they are many."""
    if len(ids) > MAX_MANY:
        advice = f"Choose fewer by another condition: {MAX_MANY} at most. The command takes any number."
        raise InvalidRequest(f"{len(ids)} jobs match", value=len(ids), advice=advice)
    if confirm != len(ids):
        advice = f"Send confirm: {len(ids)} to act on all of them."
        raise NotConfirmed(f"{len(ids)} jobs match", value=len(ids), advice=advice)


def _add_many(router: APIRouter, sources: Sources) -> None:
    @router.post("/cancel", **answers(models.Results[Cancelled]))
    def cancel_many(by: Operator, body: models.CancelMany) -> Response:
        """Cancel all jobs that meet the conditions, once their number is confirmed."""
        app, stores = sources.acting()
        chosen = {"task": body.task, "group": body.group, "state": body.state}
        _check(chosen)
        if not any(chosen.values()):
            raise wrong_parameter("task", "", "Choose jobs by their task, group or state.")
        ids = matching(stores, task=body.task, group=body.group, state=body.state)
        check_confirmed(ids, body.confirm)
        results = jobs.cancel(app, stores, by, ids, terminate=body.terminate, chosen=chosen) if ids else ()
        return _results(list(results))

    @router.post("/retry", **answers(models.Results[RetryResult]))
    def retry_many(by: Operator, body: models.RetryMany) -> Response:
        """Retry all failed and lost jobs that meet the conditions, once their number is confirmed."""
        app, stores = sources.acting()
        chosen = {"task": body.task, "since_seconds": body.since_seconds}
        _check({"task": body.task})
        ids = failed_jobs(stores, body.task, body.since_seconds, body.again)
        check_confirmed(ids, body.confirm)
        results = jobs.retry_all(app, stores, by, ids, again=body.again, chosen=chosen) if ids else ()
        return _results(list(results))


def _check(words: dict[str, str | None]) -> None:
    """Refuse the character NUL, which no text of Postgres has."""
    for name, word in words.items():
        if word is not None and "\0" in word:
            raise wrong_parameter(name, word, "Leave the character NUL out.")


def _add_workers(router: APIRouter, sources: Sources) -> None:
    @router.post("/workers/{name}/cordon", **answers(models.Results[OrderedWorker]))
    def cordon(name: WorkerName, by: Operator, body: models.Reason | None = None) -> Response:
        """Admit nothing more to a worker. What runs there goes on."""
        return _results(controls.cordon(sources.acting()[1], by, [name], reason=None if body is None else body.reason))

    @router.post("/workers/{name}/uncordon", **answers(models.Results[OrderedWorker]))
    def uncordon(name: WorkerName, by: Operator) -> Response:
        """Admit jobs to a worker again. It ends a drain, too."""
        return _results(controls.uncordon(sources.acting()[1], by, [name]))

    @router.post("/workers/{name}/drain", **answers(models.Results[OrderedWorker]))
    def drain(name: WorkerName, by: Operator, body: models.Drain | None = None) -> Response:
        """Admit nothing more to a worker, and let it become empty."""
        order = body or models.Drain()
        stores, deadline = sources.acting()[1], order.deadline_seconds
        return _results(controls.drain(stores, by, [name], reason=order.reason, deadline=deadline))

    @router.post("/workers/{name}/shutdown", **answers(models.Results[OrderedWorker]))
    def shutdown(name: WorkerName, by: Operator, body: models.Drain | None = None) -> Response:
        """Drain a worker, and end its process once it is empty."""
        order = body or models.Drain()
        stores, deadline = sources.acting()[1], order.deadline_seconds
        return _results(controls.drain(stores, by, [name], reason=order.reason, deadline=deadline, stops=True))


def _add_parts(router: APIRouter, sources: Sources) -> None:
    @router.post("/pause", **answers(models.Results[PausedPart]))
    def pause(by: Operator, body: models.Pause) -> Response:
        """Start nothing more of a queue, a task, a tenant or the platform. Submissions are accepted, and wait."""
        scope = Scope.of(body.queue, body.task, body.tenant)
        return _results([controls.pause(sources.acting()[1], by, scope, reason=body.reason)])

    @router.post("/resume", **answers(models.Results[PausedPart]))
    def resume(by: Operator, body: models.Part) -> Response:
        """Start a queue, a task, a tenant or the platform again."""
        return _results([controls.resume(sources.acting()[1], by, Scope.of(body.queue, body.task, body.tenant))])

    @router.post("/reconcile", **answers(models.Results[Reconciled]))
    def reconcile(by: Operator) -> Response:
        """Make the ledger equal Postgres, and say what differed."""
        done, _ = controls.reconcile_stores(sources.acting()[1], by)
        return json_answer({"results": [{**done.to_json(), "all_repaired": done.all_repaired}]})

    @router.post("/quarantine/drop", **answers(models.Results[models.Dropped]))
    def drop(by: Operator, body: models.Messages) -> Response:
        """Delete messages that were set aside."""
        ids = list(dict.fromkeys(body.ids))
        return json_answer({"results": [{"dropped": controls.drop_quarantined(sources.acting()[1], by, ids)}]})

    @router.post("/quarantine/requeue", **answers(models.Results[models.RequeuedMessage]))
    def requeue(by: Operator, body: models.Messages) -> Response:
        """Put messages that were set aside back where they came from. Why another one stays is in its result."""
        app, stores = sources.acting()
        return _results(controls.requeue_quarantined(app, stores, by, list(dict.fromkeys(body.ids))))


def _submission(body: models.Submit) -> Submission:
    options = body.model_dump(exclude={"task", "args", "kwargs", "id"}, exclude_none=True)
    return Submission(body.task, body.args, body.kwargs, body.id, options)


def _add_submissions(router: APIRouter, sources: Sources) -> None:
    @router.post("/jobs", **answers(models.Submitted))
    def submit(by: Operator, body: models.Submit) -> Response:
        """Submit a job by the name of its task. The job is durable with the answer."""
        app, stores = sources.acting()
        (result,) = submitting.submit_all(app, stores, by, [_submission(body)])
        if result.refused is not None:
            raise result.refused
        return json_answer(result.to_json())

    @router.post("/jobs/bulk", **answers(models.SubmittedMany))
    def submit_many(by: Operator, body: models.SubmitMany) -> Response:
        """Submit many jobs. Each is accepted or refused by itself."""
        app, stores = sources.acting()
        results = submitting.submit_all(app, stores, by, [_submission(job) for job in body.jobs])
        return json_answer({"jobs": [result.to_json() for result in results]})


def _add_audit(router: APIRouter, sources: Sources) -> None:
    @router.get("/audit", **reads(models.Audit))
    def audit(limit: Limit = PAGE, cursor: Cursor = None) -> Response:
        """Return the actions of operators, by the API and by commands, the newest first."""
        return json_answer(sources.audit(limit, cursor))

    @router.get("/quarantine", **reads(models.Quarantine))
    def quarantine(limit: Limit = PAGE, cursor: Cursor = None) -> Response:
        """Return messages that were set aside, the newest first, without their bytes."""
        return json_answer(sources.quarantine(limit, cursor))
