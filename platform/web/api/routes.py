"""The paths below `/api/v1` that read, the checks of health and the metrics."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, FastAPI, Header, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from celery_capacity.platform.documents import cluster, errors
from celery_capacity.platform.documents import job as job_documents
from celery_capacity.platform.documents.parts import Closed
from celery_capacity.platform.web import missing_workers, waiting_groups
from celery_capacity.platform.web.api import models
from celery_capacity.platform.web.api.feed import Feed
from celery_capacity.platform.web.api.filters import (
    MAX_TEXT,
    Cursor,
    Limit,
    Text,
    filter_of,
    moment_of,
    position_of,
    stretch_of,
    text_of,
)
from celery_capacity.platform.web.api.stream import EventStream
from celery_capacity.platform.web.api.workflow_models import Workflow
from celery_capacity.platform.web.http.problems import MEDIA_TYPE, wrong_parameter
from celery_capacity.platform.web.http.tagged import Tagged
from celery_capacity.platform.web.prepared import Prepared, PreparedByKey, to_json
from celery_capacity.platform.web.runs import MAX_RUNS, RUNS
from celery_capacity.platform.web.sources import MAX_LINES, MAX_PAGE, PAGE, Sources
from celery_capacity.routing.model.identifiers import MAX_JOB_ID
from celery_capacity.routing.model.states import State
from celery_capacity.workers.supervision import exposition

#: Errors that each path may answer with.
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": errors.Problem, "content": {MEDIA_TYPE: {}}}
    for status in (400, 401, 403, 404, 409, 411, 413, 421, 429, 500, 501, 503)
}


#: Seconds for which the missing workers are shown again.
MISSING_AGE: Final = 2.0
#: Seconds for which the lines of the last hour are shown again. They have a point a minute.
LAST_HOUR_AGE: Final = 10.0


class Values:
    """Values that all requests share, each read when one asks for it."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.dashboard = Prepared(lambda: sources.dashboard())
        self.missing = Prepared(lambda: sources.missing(), least=MISSING_AGE)
        self.groups = Prepared(lambda: sources.groups())
        self.tasks = Prepared(lambda: sources.tasks())
        self.last_hour = Prepared(lambda: sources.last_hour(), least=LAST_HOUR_AGE)
        self.held = PreparedByKey(lambda names: sources.held(names))
        self.workflow = PreparedByKey(lambda job: sources.workflow(job))
        self.metrics = Prepared(lambda: sources.metrics())


def json_answer(body: bytes | dict[str, Any]) -> Response:
    return Tagged(body if isinstance(body, bytes) else to_json(body))


def answers(model: type[Closed]) -> dict[str, Any]:
    return {"responses": {200: {"model": model}, **_ERRORS}, "response_class": Response}


def reads(model: type[Closed]) -> dict[str, Any]:
    """Return the answers of a path that reads: a client that has the value already is told so."""
    answer = answers(model)
    return {**answer, "responses": {**answer["responses"], 304: {"description": "the value that If-None-Match names"}}}


def add_routes(app: FastAPI, values: Values, feed: Feed) -> None:
    """Add all paths of the API."""
    router = APIRouter(prefix="/api/v1", tags=["read"])
    _add_cluster(router, values)
    _add_jobs(router, values)
    _add_runs(router, values.sources)
    _add_events(router, feed)
    app.include_router(router)
    _add_health(app, values)


def _add_cluster(router: APIRouter, values: Values) -> None:
    @router.get("/dashboard", **reads(cluster.Dashboard))
    async def dashboard() -> Response:
        """Return the cluster at a moment, as `cluster --json` prints it."""
        return json_answer(await values.dashboard.body())

    @router.get("/workers", **reads(models.Workers))
    async def workers(limit: Limit = PAGE, cursor: Text = None) -> Response:
        """Return the live workers by name, and those that are missing."""
        seen = await values.dashboard.value()
        missing = missing_workers.without_live(await values.missing.value(), seen["workers"])
        behind = [worker for worker in seen["workers"] if worker["name"] > (cursor or "")]
        page = behind[:limit]
        rest = page[-1]["name"] if len(page) < len(behind) else None
        document = {"workers": page, "missing": missing, "next_cursor": rest}
        return json_answer({**document, "source": seen["source"], "at": seen["at"]})

    @router.get("/backlog", **reads(cluster.Backlog))
    async def backlog() -> Response:
        """Return what waits, why, and since when; first what no worker can ever take."""
        return json_answer(waiting_groups.document(await values.dashboard.value(), await values.groups.value()))

    @router.get("/last-hour", **reads(models.LastHour))
    async def last_hour() -> Response:
        """Return the last hour minute by minute: allocated CPUs, waiting jobs, starts, ends and waits."""
        return json_answer(await values.last_hour.body())

    @router.get("/tasks", **reads(job_documents.Tasks))
    async def tasks() -> Response:
        """Return the figures of each task over the newest jobs."""
        return json_answer(await values.tasks.body())


def _add_jobs(router: APIRouter, values: Values) -> None:
    @router.get("/jobs", **reads(models.Jobs))
    async def jobs(
        state: Annotated[list[State], Query(description="only jobs in these states")] = [],  # noqa: B006
        task: Text = None,
        queue: Text = None,
        worker: Text = None,
        group: Text = None,
        text: Text = None,
        since: Text = None,
        until: Text = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = PAGE,
        cursor: Cursor = None,
    ) -> Response:
        """Return jobs, the newest first. `*` stands for any text in `task`, `queue` and `worker`."""
        wanted = filter_of(state, task=task, queue=queue, worker=worker, group=group, text=text, times=(since, until))
        return json_answer(await run_in_threadpool(values.sources.jobs, wanted, limit, cursor))

    @router.get("/jobs/{job_id}", **reads(job_documents.JobDetail))
    async def job(
        job_id: Annotated[str, Path(max_length=MAX_JOB_ID, description="an id, or its beginning")],
    ) -> Response:
        """Return one job with its attempts, and why it waits."""
        document = await run_in_threadpool(values.sources.job, job_id)
        return json_answer(document.to_json())

    @router.get("/jobs/{job_id}/workflow", **reads(Workflow))
    async def workflow(
        job_id: Annotated[str, Path(max_length=MAX_JOB_ID, description="an id, or its beginning")],
    ) -> Response:
        """Return the canvas around a job: parents, children, groups, chords, replacements, and the steps ahead."""
        job = await run_in_threadpool(values.sources.whole_id, job_id)
        return json_answer((await values.workflow(job).value()).to_json())

    @router.get("/jobs/{job_id}/logs", **reads(models.LogLines))
    async def logs(
        job_id: Annotated[str, Path(max_length=MAX_JOB_ID, description="an id, or its beginning")],
        attempt: Annotated[int | None, Query(ge=0, lt=2**31, description="only lines of this attempt")] = None,
        after: Annotated[str | None, Query(max_length=64, description="the `cursor` of an earlier answer")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LINES)] = MAX_LINES,
    ) -> Response:
        """Return what a job has logged and printed: the newest lines that are kept, or those that follow `after`."""
        return json_answer(await run_in_threadpool(values.sources.logs, job_id, limit, attempt, position_of(after)))


def _add_runs(router: APIRouter, sources: Sources) -> None:
    @router.get("/runs", **reads(models.Runs))
    async def runs(
        since: Text = None, until: Text = None, limit: Annotated[int, Query(ge=1, le=MAX_RUNS)] = RUNS
    ) -> Response:
        """Return who ran where: the attempts of a stretch of time, by default of the last hour."""
        return json_answer(await run_in_threadpool(sources.runs, *stretch_of(since, until), limit))

    @router.get("/runs/hole", **reads(models.Hole))
    async def hole(
        worker: Annotated[str, Query(min_length=1, max_length=MAX_TEXT)],
        at: Annotated[
            str, Query(min_length=1, max_length=MAX_TEXT, description="a time that is over", examples=["10min"])
        ],
    ) -> Response:
        """Return what was free on a worker at a moment, and which jobs waited then, as far as Postgres keeps it."""
        return json_answer(await run_in_threadpool(sources.hole, text_of("worker", worker), moment_of("at", at)))


def _add_events(router: APIRouter, feed: Feed) -> None:
    @router.get("/events", responses={200: {"content": {"text/event-stream": {}}}, **_ERRORS}, response_class=Response)
    async def events(
        only: Annotated[str | None, Query(description="`changes`: at most four events a second, without data")] = None,
        last_event_id: Annotated[str | None, Header(max_length=64)] = None,
    ) -> Response:
        """Follow the changes of jobs (Server-Sent Events): `job`, `cluster`, `source`, `reset` and `tick`.

        A client that sends the `Last-Event-ID` that it saw goes on from there. After `reset` and `source` some events
        may be missing, and the client reads the state anew.
        """
        if only not in (None, "changes"):
            raise wrong_parameter("only", only, "Leave it out, or write only=changes.")
        return EventStream(feed, feed.follow(last_event_id), paced=only is not None)


def _add_health(app: FastAPI, values: Values) -> None:
    async def health(_request: Request) -> Response:
        return json_answer({"status": "ok"})

    async def ready(_request: Request) -> Response:
        await values.dashboard.value()
        return json_answer({"status": "ok"})

    async def metrics(_request: Request) -> Response:
        return Response(await values.metrics.value(), media_type=exposition.MEDIA_TYPE)

    for path in ("/health", "/healthz"):
        app.add_route(path, health, methods=["GET"], include_in_schema=False)
    app.add_route("/readyz", ready, methods=["GET"], include_in_schema=False)
    app.add_route("/metrics", metrics, methods=["GET"], include_in_schema=False)
