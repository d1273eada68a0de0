"""`celery -A platform dashboard`: the page of the cluster and its API, until Ctrl-C."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from celery_capacity.platform.console.command import Command, log_format_option, stores_of
from celery_capacity.platform.console.terminal import talk
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.workers.logs import json_lines, log_format
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    import socket


@click.command(
    "dashboard",
    cls=Command,
    examples=(
        ("Serve on this machine, as PLATFORM_DASHBOARD says", "celery -A platform dashboard"),
        ("Take a free port, and say which", "celery -A platform dashboard --port 0"),
        ("Serve others too, who log in by PLATFORM_TOKEN", "celery -A platform dashboard --host 0.0.0.0 --port 8080"),
    ),
    codes={
        Exit.OK: "ended by Ctrl-C or `kill`",
        Exit.FAILED: "it cannot listen there: the port is taken, the address is not this machine's, or there is no"
        " token",
    },
    never=(Exit.INTERRUPTED,),
)
@click.option("--host", metavar="HOST", help="Address to listen on, instead of PLATFORM_DASHBOARD's.")
@click.option("--port", metavar="PORT", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@log_format_option
@click.pass_context
def command(context: click.Context, host: str | None, port: int | None) -> None:
    """Serve the page of the cluster, and its API below /api/v1, until Ctrl-C.

    On this machine only (127.0.0.1:8000) unless PLATFORM_DASHBOARD or the options say otherwise. Reading needs no
    login there. With PLATFORM_TOKEN it does, and no other address is served without one. To act, on a page too,
    takes that token, else the one that the first start makes and prints.
    """
    # FastAPI and uvicorn take most of a second. No other command imports them.
    from celery_capacity.platform.web.application import Application
    from celery_capacity.platform.web.http import server, token_file
    from celery_capacity.platform.web.http.login import Access
    from celery_capacity.platform.web.sources import Sources

    json_lines.set_up()
    stores = stores_of(context)
    settings = stores.settings
    own_host, own_port = settings.dashboard
    listen = host or own_host
    sockets = server.bind(listen, own_port if port is None else port)
    if settings.token is None and not server.is_for_this_machine(sockets):
        for bound in sockets:
            bound.close()
        raise InvalidRequest(
            f"the dashboard does not listen on {listen} without a token: whoever reaches it would see the cluster",
            value=listen,
            advice="Set PLATFORM_TOKEN or PLATFORM_TOKEN_FILE, or listen on 127.0.0.1.",
        )
    made = None if settings.token is not None else token_file.read_or_make(settings.home)
    application = Application(
        Sources(stores, lambda: context.obj.app),
        listen,
        settings.token or (made[0] if made is not None else None),
        access=Access(settings.viewer_token, settings.token is None, settings.proxy_user_header),
    )
    _announce(sockets)
    if settings.token is None:
        _announce_token(made, settings.home)
    asyncio.run(server.serve(application, sockets))


def _announce_token(made: tuple[str, Path, bool] | None, home: Path) -> None:
    """Say where the token for actions is, and at the first start the token itself."""
    if made is None:
        _say(f"No actions: {home} takes no token. Set PLATFORM_TOKEN to act.")
        return
    token, path, is_new = made
    # Logs are collected, and read by many.
    is_shown = is_new and not log_format.is_asked_for()
    _say(f"Token for actions: {f'{token}, kept ' if is_shown else ''}in {path}")


def _announce(sockets: list[socket.socket]) -> None:
    host, port = sockets[0].getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    # A single write, so that a reader who has the first line has the second one too.
    api, page = f"Dashboard: http://{shown}:{port}/api/v1/dashboard", f"Page: http://{shown}:{port}/"
    _say(f"{api}\n{page}", api, page)


def _say(text: str, *lines: str) -> None:
    """Print a text. Where lines in JSON are asked for, these are `lines`, by default the text as one."""
    if log_format.is_asked_for():
        text = "\n".join(json_lines.line_of("INFO", __name__, line) for line in lines or (text,))
    talk().print(text, soft_wrap=True, markup=False, highlight=False)
