"""`celery -A platform down`: end the embedded servers; their data stay."""

from __future__ import annotations

import os

import click

from platform import servers
from platform.edge import answering, json_option
from platform.terminal import facts, print_json
from routing.settings import Settings

__all__ = ["command"]


@click.command("down")
@json_option
def command(as_json: bool) -> None:
    """End the embedded servers; their data stay for the next start.

    Workers that still run wait for the servers and go on when they are back. Servers named by REDIS_URL and
    DATABASE_URL are never ended. Exit code 0, also if none ran.
    """
    with answering(as_json):
        settings = Settings.from_environ(os.environ)
        ended = servers.stop(settings)
    if as_json:
        print_json({"ended": ended, "home": str(settings.home)})
    elif ended:
        facts().print(f"Ended {' and '.join(ended)}. Their data stay in {settings.home}.", soft_wrap=True)
    else:
        facts().print(f"No embedded servers of {settings.home} run.", soft_wrap=True)
