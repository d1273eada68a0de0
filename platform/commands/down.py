"""`celery -A platform down`: end the embedded servers; their data stay."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, json_option, settings_of_environment
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.platform.embedded import servers


@click.command(
    "down",
    cls=Command,
    examples=(
        ("End the embedded servers of this user", "celery -A platform down"),
        ("What was ended, for a program", "celery -A platform down --json"),
    ),
)
@json_option
def command(as_json: bool) -> None:
    """End the embedded servers; their data stay for the next start.

    Workers that still run wait for the servers and go on when they are back. Servers named by REDIS_URL and
    DATABASE_URL are never ended. Also done where none ran.
    """
    settings = settings_of_environment()
    ended = servers.stop(settings)
    if as_json:
        print_json({"ended": ended, "home": str(settings.home)})
    elif ended:
        facts().print(f"Ended {' and '.join(ended)}. Their data stay in {settings.home}.")
    else:
        facts().print(f"No embedded servers of {settings.home} run.")
