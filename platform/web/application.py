"""The application: the API, the pages and their files, behind one guard."""

from __future__ import annotations

import socket

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from celery_capacity.platform.web.api.actions import add_actions
from celery_capacity.platform.web.api.feed import Feed
from celery_capacity.platform.web.api.routes import Values, add_routes
from celery_capacity.platform.web.api.security_schemes import add_security_schemes
from celery_capacity.platform.web.http.login import Access, Login
from celery_capacity.platform.web.http.problems import add_handlers
from celery_capacity.platform.web.http.security import Guard, Rates
from celery_capacity.platform.web.pages.routes import add_pages
from celery_capacity.platform.web.sources import Sources
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.workers.process.identity import platform_version


class Application:
    """ASGI application of the dashboard.

    `name` is the name under which the server was told to listen. The server answers to that name, to the machine's own
    name, to localhost and to addresses. `token`: of operators; without it, all who reach the server may read, and
    nobody acts. `access`: of others, and to what.
    """

    def __init__(
        self,
        sources: Sources,
        name: str = "localhost",
        token: str | None = None,
        rates: Rates | None = None,
        access: Access = Access(),  # noqa: B008
    ) -> None:
        app = FastAPI(
            title="celery-capacity",
            version=platform_version(),
            description="Capacity, backlog and jobs of a cluster, and the actions of its operators.",
            openapi_url="/api/v1/openapi.json",
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
        )
        login = None if token is None else Login(token, access=access)
        self._feed = Feed(lambda: quick_client(sources.stores.redis), lambda: sources.stores.engine)
        values = Values(sources)
        add_handlers(app)
        add_routes(app, values, self._feed)
        add_actions(app, sources, login, access.user_header)
        add_security_schemes(app, open_reading=login is None or access.open_reading, user_header=access.user_header)
        add_pages(app, values, login)
        names = frozenset({"localhost", name.lower(), socket.gethostname().lower()})
        self._guard = Guard(app, names, login, rates)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard(scope, receive, send)

    def close(self) -> None:
        """End all streams of events, so that the server can end."""
        self._feed.close()
