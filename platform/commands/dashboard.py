"""`celery -A platform dashboard`: the overview over HTTP, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import socket
from ipaddress import ip_address
from typing import Any

import click

from celery_capacity.platform.console.command import Command, stores_of
from celery_capacity.platform.console.terminal import talk
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.workers.process.exit_codes import Exit


@click.command(
    "dashboard",
    cls=Command,
    examples=(
        ("Serve on this machine, as PLATFORM_DASHBOARD says", "celery -A platform dashboard"),
        ("Take a free port, and say which", "celery -A platform dashboard --port 0"),
        ("Serve whoever reaches this machine", "celery -A platform dashboard --host 0.0.0.0 --port 8080"),
    ),
    codes={
        Exit.OK: "ended by Ctrl-C or `kill`",
        Exit.FAILED: "it cannot listen there: the port is taken, the address is not this machine's",
    },
    never=(Exit.INTERRUPTED,),
)
@click.option("--host", metavar="HOST", help="Address to listen on, instead of PLATFORM_DASHBOARD's.")
@click.option("--port", metavar="PORT", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.pass_context
def command(context: click.Context, host: str | None, port: int | None) -> None:
    """Serve /api/v1/dashboard and /health over HTTP until Ctrl-C.

    On this machine only (127.0.0.1:8000) unless PLATFORM_DASHBOARD or the options say otherwise. There is no login
    yet: another address than a loopback one shows the cluster to whoever reaches it, and gives a warning.
    """
    from celery_capacity.routing.inspect import overview
    from celery_capacity.routing.ledger.connection import quick_client

    stores = stores_of(context)
    own_host, own_port = stores.settings.dashboard
    listen = host or own_host
    sockets = _bind(listen, own_port if port is None else port)
    client, engine, ttl = quick_client(stores.redis), stores.engine, stores.settings.worker_ttl

    def read() -> dict[str, Any]:
        return overview.read(client, engine, ttl).to_json()

    asyncio.run(_serve(read, sockets, listen))


def _bind(host: str, port: int) -> list[socket.socket]:
    from tornado.netutil import bind_sockets

    try:
        return bind_sockets(port, host, reuse_port=False)
    except (OSError, ValueError) as error:  # ValueError: a text that is not a host name
        raise InvalidRequest(
            f"the dashboard cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            value=f"{host}:{port}",
            advice="Choose another with PLATFORM_DASHBOARD, --host or --port.",
        ) from error


async def _serve(read: Any, sockets: list[socket.socket], name: str) -> None:
    from tornado.httpserver import HTTPServer

    from celery_capacity.platform.dashboard import LIMITS, application

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    server = HTTPServer(application(read, name), **LIMITS)
    server.add_sockets(sockets)
    host, port = sockets[0].getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    talk().print(f"Dashboard: http://{shown}:{port}/api/v1/dashboard")
    if not all(ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback for bound in sockets):
        talk().print(
            f"Warning: the dashboard has no login yet. Whoever reaches {shown}:{port} sees the cluster: put a proxy"
            " with a login in front of it, or listen on 127.0.0.1.",
        )
    await ended.wait()
    server.stop()
    await server.close_all_connections()
