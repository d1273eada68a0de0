"""`celery -A platform servers`: the embedded Redis and Postgres, for a project that starts its own workers."""

from __future__ import annotations

import click

from celery_capacity.platform.console.command import Command, Group, json_option, settings_of_environment
from celery_capacity.platform.console.terminal import facts, print_json
from celery_capacity.platform.embedded import servers
from celery_capacity.routing.errors import mask_url


@click.group(
    "servers",
    cls=Group,
    examples=(("Redis and Postgres, for workers of your own", "celery -A platform servers start"),),
)
def command() -> None:
    """Start the embedded servers alone; `down` ends them."""


@command.command(
    "start",
    cls=Command,
    examples=(
        ("Redis and Postgres, for workers of your own", "celery -A platform servers start"),
        ("Their URLs, for a program", "celery -A platform servers start --json"),
    ),
)
@json_option
def start(as_json: bool) -> None:
    """Start Redis and Postgres on this machine, and bring the tables up to date.

    They stay until `celery -A platform down`. Harmless where they run; servers named by REDIS_URL and
    DATABASE_URL are left as they are, and only their tables are brought up to date.
    """
    from celery_capacity import migrations

    configured = settings_of_environment()
    settings = servers.ensure(configured)
    redis_url, database_url = str(settings.redis_url), str(settings.database_url)
    migrations.upgrade(database_url)
    embedded = configured.redis_url is None
    if as_json:
        # The URLs of embedded servers have no password. SQLAlchemy's name of the driver concerns nobody else.
        plain = mask_url(database_url).replace("postgresql+psycopg2://", "postgresql://")
        print_json({"redis_url": mask_url(redis_url), "database_url": plain, "embedded": embedded})
    else:
        facts().print(servers.describe(settings))
