"""Pages by which operators act: a form that says what it does, then the action, then what became of it.

A form acts only with the form token of an operator's session, and only from a page of this server. Its path has the
targets and its body the rest, so that it works without a script, and after a login.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import parse_qs, quote

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from celery_capacity.platform.web.api.actions import actor_of, check_confirmed
from celery_capacity.platform.web.http import login as logins
from celery_capacity.platform.web.http.login import Login, Role
from celery_capacity.platform.web.http.problems import NotAllowed, UnknownAction, wrong_parameter
from celery_capacity.platform.web.pages.forms import FORMS, Form, Kind, Order, fill_in, order_of
from celery_capacity.platform.web.sources import PAGE, Sources
from celery_capacity.routing.database.audit import Actor, Way
from celery_capacity.routing.errors import PlatformError

#: Bytes of the body of a form.
MAX_BODY: Final = 16 * 1024
#: Targets that a form lists.
LISTED: Final = 10


async def body_of(request: Request, most: int) -> dict[str, str]:
    """Return the values of a form. Raises `InvalidRequest` for a body that is too large."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise wrong_parameter("the form", f"{len(body)} bytes", f"Send at most {most} bytes.")
    return {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


class Acting:
    """The forms, the audit and the quarantine. `page`: returns a page of a request, by its name and its values."""

    def __init__(self, page: Callable[..., Response], sources: Sources, login: Login | None) -> None:
        self._page = page
        self._sources = sources
        self._login = login

    async def form(self, request: Request) -> Response:
        """Show a form, or act by it."""
        name = request.path_params["name"]
        form = FORMS.get(name)
        if form is None:
            raise wrong_parameter("action", name, f"Write one of {', '.join(FORMS)}.")
        session = None if self._login is None else self._login.session(request.headers)
        if session is None and self._login is not None:
            target = f"{request.url.path}?{request.url.query}"
            return RedirectResponse(f"/login?next={quote(target, safe='/')}", 303)
        if session is None or session.role is not Role.OPERATOR:
            raise NotAllowed("viewers change nothing", advice="Log out, and log in by the token of operators.")
        if request.method == "GET":
            order = await run_in_threadpool(order_of, self._sources, name, request.query_params)
            if form.kind is Kind.JOBS:
                check_confirmed(order.targets, len(order.targets))
            return self._show(request, form, order)
        if not logins.is_same_origin(request.headers):
            raise NotAllowed("the request comes from a page of another site", advice="Act by the pages themselves.")
        values = await body_of(request, MAX_BODY)
        if not logins.may_act(session, values.pop("form_token", "")):
            raise NotAllowed("the form is not one of this login", advice="Open the page of the action again.")
        return await self._act(request, name, form, values)

    async def _act(self, request: Request, name: str, form: Form, values: dict[str, str]) -> Response:
        rows: list[int] = []
        by = actor_of(request, Way.PAGE)
        actor = Actor(by.name, by.way, rows.append)
        order = await run_in_threadpool(order_of, self._sources, name, request.query_params)
        try:
            order = fill_in(order, values)
            if form.kind is Kind.JOBS:
                number = values.get("number", "")
                check_confirmed(order.targets, int(number) if number.isdecimal() and len(number) < 9 else None)
            await run_in_threadpool(form.run, self._sources, actor, order)
        except PlatformError as error:
            return self._show(request, form, order, error, values)
        return RedirectResponse(f"/audit/{rows[-1]}", 303)

    def _show(
        self,
        request: Request,
        form: Form,
        order: Order,
        problem: PlatformError | None = None,
        values: dict[str, str] | None = None,
    ) -> Response:
        return self._page(
            request,
            "act",
            200 if problem is None else problem.status,
            form=form,
            order=order,
            problem=problem,
            values=values or {},
            listed=order.targets[:LISTED],
            back=_back(form, order.targets, request),
        )

    async def audit(self, request: Request) -> Response:
        """Show the actions of operators, the newest first."""
        cursor = _cursor(request)
        listed = await run_in_threadpool(self._sources.audit, PAGE, cursor)
        return self._page(
            request, "audit", actions=listed["actions"], older=listed["next_cursor"], first=cursor is None
        )

    async def action(self, request: Request) -> Response:
        """Show one action, and what became of it."""
        seq = request.path_params["seq"]
        number = int(seq) if seq.isascii() and seq.isdigit() and len(seq) < 19 else -1
        entry = await run_in_threadpool(self._sources.action, number)
        if entry is None:
            raise UnknownAction(f"there is no action {seq[:20]}", value=seq[:20])
        return self._page(request, "action", action=entry)

    async def quarantine(self, request: Request) -> Response:
        """Show messages that were set aside, the newest first."""
        cursor = _cursor(request)
        listed = await run_in_threadpool(self._sources.quarantine, PAGE, cursor)
        return self._page(
            request, "quarantine", messages=listed["messages"], older=listed["next_cursor"], first=cursor is None
        )


def _cursor(request: Request) -> int | None:
    cursor = request.query_params.get("cursor", "")
    if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise wrong_parameter("cursor", cursor, "Follow the link to older ones.")
    return int(cursor) if cursor else None


def _back(form: Form, targets: Sequence[str], request: Request) -> str:
    """Return the path of the page that a form belongs to."""
    if form.kind is Kind.JOB:
        return f"/jobs/{quote(targets[0], safe='')}"
    if form.kind is Kind.JOBS:
        return f"/jobs?{request.url.query}"
    return {Kind.PART: "/waiting", Kind.MESSAGES: "/quarantine"}.get(form.kind, "/")
