"""The paths of the pages. Each shows the documents of the API; the browser asks for it again when something changed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from fastapi import FastAPI, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from celery_capacity.platform.console import render
from celery_capacity.platform.console.command import problem_of_store
from celery_capacity.platform.console.fitting import shorten
from celery_capacity.platform.console.terminal import harmless
from celery_capacity.platform.web import missing_workers
from celery_capacity.platform.web.api.filters import MAX_TEXT, filter_of_query, moment_of, stretch_of, text_of
from celery_capacity.platform.web.api.routes import Values
from celery_capacity.platform.web.http import login as logins
from celery_capacity.platform.web.http.login import Login, Role
from celery_capacity.platform.web.http.problems import wrong_parameter
from celery_capacity.platform.web.http.security import DOCS, Rates
from celery_capacity.platform.web.pages import api_reference, bars, graph, lines, timeline, worker_list
from celery_capacity.platform.web.pages.acting import Acting, body_of
from celery_capacity.platform.web.pages.language import (
    COOKIE,
    LANGUAGES,
    language_of,
    paragraph,
    reason_sentences,
    reason_words,
    translator,
)
from celery_capacity.platform.web.pages.worker_list import Wanted
from celery_capacity.platform.web.prepared import Prepared
from celery_capacity.platform.web.sources import PAGE
from celery_capacity.routing.config.redaction import hidden_text
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, format_amount, format_memory, from_people
from celery_capacity.routing.model.expected import duration_text
from celery_capacity.routing.model.request import Request as Amounts
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT

_FOLDER: Final = Path(__file__).parent
#: Seconds for which a browser keeps the chosen language: a year.
KEEP_LANGUAGE: Final = 365 * 86400
#: Workers on a page.
WORKERS: Final = 50
#: Characters of an id in a list.
BRIEF: Final = 14
#: Runs in the table beside the chart, and seconds that the chart shows at first.
LISTED_RUNS: Final = 100
STRETCH: Final = 900
#: Words for the end of a run.
OUTCOMES: Final = (
    *("running", "succeeded", "failed", "cancelled", "expired", "replaced", "retried", "requeued", "handed_back"),
    *("taken_back", "lost"),
)
#: Logins that a client may try at once, and each second.
TRIES: Final = 10
TRIES_PER_SECOND: Final = 0.2
#: Characters of a value on the page of a job.
SHOWN_VALUE: Final = 20_000


def _age_since(time: str | datetime | None, now: datetime) -> float | None:
    if time is None:
        return None
    moment = datetime.fromisoformat(time) if isinstance(time, str) else time
    return max(0.0, (now - moment).total_seconds())


def _end_of(run: Mapping[str, Any], now: datetime) -> datetime:
    return datetime.fromisoformat(run["ended_at"]) if run["ended_at"] else now


def knows_of_news(request: Request) -> bool:
    """Return True if a page asks again because it heard of a change: then older values are of no use to it."""
    return "x-live" in request.headers


def _value(text: str | None) -> str:
    """Return the text of arguments or of a result as it may be shown: secrets hidden, and not endless."""
    shown = hidden_text(text or "")
    return shown if len(shown) <= SHOWN_VALUE else f"{shown[:SHOWN_VALUE]}…"


#: Newest lines of a job's log on its page.
LOGGED: Final = 200


class Pages:
    """The pages, on values that all requests share."""

    def __init__(self, values: Values, login: Login | None) -> None:
        self._values = values
        self._login = login
        self._tries = Rates(TRIES, TRIES_PER_SECOND)
        self._templates = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        filters: dict[str, Any] = {
            "shown": lambda text: harmless(str(text)),
            "age": render.age,
            "amounts": lambda request: str(Amounts.from_people(request)),
            "path": lambda text: quote(str(text), safe=""),
            "brief": lambda job_id: shorten(harmless(str(job_id)), BRIEF),
            "colour": bars.colour_of,
            "words": lines.words,
            "trend": lines.trend,
            "memory": lambda amount: format_memory(amount) if amount else "–",
            "vector": lambda people: ", ".join(format_amount(*part) for part in from_people(people).items()),
        }
        self._templates.filters.update(filters)

    def page(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        """Return a page in the language of the request, with the forms of an operator where one is logged in."""
        language = language_of(request)
        session = None if self._login is None else self._login.session(request.headers)
        query = request.url.query
        html = self._templates.get_template(f"{name}.html").render(
            t=translator(language),
            reason=lambda kind: reason_words(kind, language),
            sentences=lambda why: reason_sentences(why, language),
            paragraph=paragraph,
            language=language,
            languages=LANGUAGES,
            current=request.url.path + (f"?{query}" if query else ""),
            section=name,
            logged_in=session is not None,
            may_log_in=self._login is not None and session is None,
            acts=session is not None and session.role is Role.OPERATOR,
            form_token="" if session is None else session.form_token,
            default_queue=DEFAULT_QUEUE,
            default_tenant=DEFAULT_TENANT,
            **values,
        )
        return HTMLResponse(html.encode("utf-8", "backslashreplace"), status)

    async def cluster(self, request: Request) -> Response:
        wanted, news, asked = Wanted.of(request.query_params), knows_of_news(request), time.monotonic()
        seen = await self._values.dashboard.value(news=news)
        selection = worker_list.select(seen["workers"], wanted, WORKERS)
        names = tuple(worker["name"] for worker in selection.workers)
        held = await self._values.held(names).value(news=news) if names else {}
        shown = [
            {
                **worker,
                "bars": bars.of_worker(worker, held.get(worker["name"], []), len(names)),
                "jobs": len(held.get(worker["name"], [])),
                "late": worker_list.status_of(worker) == "late",
            }
            for worker in selection.workers
        ]
        totals = bars.totals(seen["resources"])
        hour = await self._values.last_hour.value()
        missing = missing_workers.without_live(await self._values.missing.value(), seen["workers"])
        shown_lines = {"hour": hour, "charts": lines.charts(hour)}
        answer = self.page(
            request,
            "cluster",
            seen=seen,
            totals=totals,
            workers=shown,
            missing=missing,
            selection=selection,
            reconciled=_age_since(seen["reconciled_at"], datetime.fromisoformat(seen["at"])),
            **shown_lines,
        )
        return self._with_age(answer, asked, self._values.dashboard)

    async def waiting(self, request: Request) -> Response:
        news = knows_of_news(request)
        asked = time.monotonic()
        groups = await self._values.groups.value(news=news)
        seen = await self._values.dashboard.value(news=news)
        answer = self.page(request, "waiting", seen=seen, groups=groups)
        return self._with_age(answer, asked, self._values.groups, self._values.dashboard)

    def _with_age(self, answer: Response, asked: float, *values: Prepared) -> Response:
        """Return an answer that tells if one of its values was read before it was asked for: the page asks again."""
        if any(value.is_older_than(asked) for value in values):
            answer.headers["X-Older"] = "1"
        return answer

    async def jobs(self, request: Request) -> Response:
        asked = request.query_params
        cursor = asked.get("cursor", "")
        if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
            raise wrong_parameter("cursor", cursor, "Follow the link to older jobs.")
        wanted = filter_of_query(asked)
        listed = await run_in_threadpool(self._values.sources.jobs, wanted, PAGE, int(cursor) if cursor else None)
        now = datetime.now().astimezone()
        rows = [{**job, "age": _age_since(job["submitted_at"], now), **_spans(job, now)} for job in listed["jobs"]]
        kept = [(name, value) for name, value in asked.multi_items() if name != "cursor" and value]
        older = urlencode([*kept, ("cursor", listed["next_cursor"])]) if listed["next_cursor"] else ""
        first, chosen = not cursor, urlencode(kept)
        return self.page(
            request, "jobs", rows=rows, asked=dict(asked), states=[*State], older=older, first=first, chosen=chosen
        )

    async def job(self, request: Request) -> Response:
        asked = time.monotonic()
        document = await run_in_threadpool(self._values.sources.job, request.path_params["job_id"])
        file, why = document.file, document.why
        logged = await run_in_threadpool(self._values.sources.logs, file.job["id"], LOGGED)
        kept = self._values.workflow(file.job["id"])
        workflow = await kept.value(news=knows_of_news(request))
        waits = why is not None and why.waits
        answer = self.page(
            request,
            "job",
            job=file.job,
            alternatives=[request.to_people() for request in file.alternatives],
            attempts=file.attempts,
            lines=timeline.lines(file),
            logged=logged["lines"],
            call={name: _value(text) for name, text in document.call.items()},
            readable=file.job["message_bytes"] is not None,
            why=why.why.value if why is not None and waits else None,
            explanation=why,
            expected=duration_text(file.job["expected_ms"]) if file.job["expected_ms"] else "",
            progress=render.progress(file.job["progress"]),
            final=file.job["state"] in FINAL,
            spans=_spans(file.job.to_json(), file.now),
            workflow=workflow,
            graph=graph.graph(workflow, file.job["id"]),
        )
        return self._with_age(answer, asked, kept)

    async def runs(self, request: Request) -> Response:
        begin, end = stretch_of(None, None)
        document = await run_in_threadpool(self._values.sources.runs, begin, end, LISTED_RUNS)
        rows = [{**run, "ran": _age_since(run["started_at"], _end_of(run, end))} for run in document["runs"]]
        return self.page(request, "runs", runs=rows, stretch=STRETCH, outcomes=OUTCOMES)

    async def hole(self, request: Request) -> Response:
        worker, at = (request.query_params.get(name, "") for name in ("worker", "at"))
        if not 0 < len(worker) <= MAX_TEXT:
            raise wrong_parameter("worker", worker, "Write the name of a worker.")
        if not 0 < len(at) <= MAX_TEXT:
            raise wrong_parameter("at", at, "Write a time that is over, such as 2026-05-04T12:00.")
        seen = await run_in_threadpool(self._values.sources.hole, text_of("worker", worker), moment_of("at", at))
        return self.page(request, "hole", hole=seen)

    async def tasks(self, request: Request) -> Response:
        return self.page(request, "tasks", figures=await self._values.tasks.value())

    async def api(self, request: Request) -> Response:
        """Return the page about the API. The first one makes its document, which takes some time."""
        address = f"{request.url.scheme}://{request.url.netloc}"
        reference = await run_in_threadpool(lambda: api_reference.read(request.app.openapi(), address))
        return self.page(request, "api", reference=reference)

    async def choose_language(self, request: Request) -> Response:
        code = request.path_params["code"]
        target = logins.path_of_this_server(request.query_params.get("next", "/"))
        answer = RedirectResponse(target, 303)
        if code in LANGUAGES:
            answer.set_cookie(COOKIE, code, max_age=KEEP_LANGUAGE, httponly=True, samesite="strict")
        return answer

    async def log_in(self, request: Request) -> Response:
        target = logins.path_of_this_server(request.query_params.get("next", "/"))
        if self._login is None:
            return RedirectResponse("/", 303)
        if request.method == "GET":
            return self.page(request, "login", target=target, problem="")
        if not logins.is_same_origin(request.headers):
            return self.page(request, "login", 403, target=target, problem="This is not the token.")
        if not self._tries.take(request.client.host if request.client else ""):
            return self.page(request, "login", 429, target=target, problem="Too many attempts. Wait a minute.")
        form = await body_of(request, logins.MAX_BODY)
        role = self._login.role_of_token(form.get("token", "").strip())
        if role is None:
            return self.page(request, "login", 401, target=target, problem="This is not the token.")
        answer = RedirectResponse(target, 303)
        session = self._login.new_session(role)
        answer.set_cookie(
            logins.COOKIE,
            session,
            max_age=logins.SESSION,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    async def log_out(self, request: Request) -> Response:
        answer = RedirectResponse("/login", 303)
        if logins.is_same_origin(request.headers):
            answer.delete_cookie(logins.COOKIE, httponly=True, samesite="strict")
        return answer

    async def problem(self, request: Request, error: PlatformError) -> Response:
        """Return an error as a page."""
        title = "Not found" if error.status == HTTPStatus.NOT_FOUND else "Something is wrong"
        return self.page(request, "problem", error.status, title=title, problem=error)


def _spans(job: Mapping[str, Any], now: datetime) -> dict[str, float | None]:
    times = {name: job[name] and datetime.fromisoformat(job[name]) for name in job if name.endswith("_at")}
    from celery_capacity.platform.console.job_views import spans

    return {name: seconds for name, seconds in spans({**job, **times}, now).items() if name != "age"}


def add_pages(app: FastAPI, values: Values, login: Login | None) -> None:
    """Add the pages and their files. An error on a page is a page too."""
    pages = Pages(values, login)
    acting = Acting(pages.page, values.sources, login)

    def with_problems(read: Any) -> Any:
        async def answer(request: Request) -> Response:
            try:
                return await read(request)  # type: ignore[no-any-return]
            except Exception as error:
                problem = problem_of_store(error)
                if problem is None:
                    raise
                return await pages.problem(request, problem)

        return answer

    paths = {
        "/": pages.cluster,
        "/waiting": pages.waiting,
        "/jobs": pages.jobs,
        "/jobs/{job_id}": pages.job,
        "/runs": pages.runs,
        "/runs/hole": pages.hole,
        "/tasks": pages.tasks,
        "/audit": acting.audit,
        "/audit/{seq}": acting.action,
        "/quarantine": acting.quarantine,
        "/language/{code}": pages.choose_language,
        DOCS: pages.api,
    }
    for path, read in paths.items():
        app.add_route(path, with_problems(read), methods=["GET"], include_in_schema=False)
    app.add_route("/act/{name}", with_problems(acting.form), methods=["GET", "POST"], include_in_schema=False)
    app.add_route("/login", with_problems(pages.log_in), methods=["GET", "POST"], include_in_schema=False)
    app.add_route("/logout", with_problems(pages.log_out), methods=["POST"], include_in_schema=False)
    app.mount("/static", GZipMiddleware(StaticFiles(directory=_FOLDER / "static"), minimum_size=1000), name="static")
