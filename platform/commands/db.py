"""`celery -A platform db`: the tables in Postgres."""

from __future__ import annotations

from typing import Final

import click

from celery_capacity import migrations
from celery_capacity.platform.console.asking import confirm
from celery_capacity.platform.console.command import Command, Group, json_option, stores_of
from celery_capacity.platform.console.terminal import facts, print_json, talk
from celery_capacity.workers.display.progress_bar import command_bar
from celery_capacity.workers.process.exit_codes import Exit

UNKNOWN_REVISION: Final = {Exit.FAILED: "there is no such revision"}


@click.group(
    "db",
    cls=Group,
    examples=(
        ("Make the tables, or bring them up to date", "celery -A platform db upgrade"),
        ("Whether an upgrade is needed", "celery -A platform db current"),
    ),
)
def command() -> None:
    """Make, upgrade or look at the tables in Postgres."""


@command.command(
    "upgrade",
    cls=Command,
    examples=(
        ("Make the tables, or bring them up to date", "celery -A platform db upgrade"),
        ("Up to a revision", "celery -A platform db upgrade 0011"),
    ),
    codes=UNKNOWN_REVISION,
)
@click.argument("revision", default="head")
@json_option
@click.pass_context
def upgrade(context: click.Context, revision: str, as_json: bool) -> None:
    """Bring the tables up to REVISION, the newest by default.

    Harmless where they are, and where two do it at once.
    """
    url = _url(context)
    before = migrations.current(url)
    with command_bar("upgrading the tables"):
        migrations.upgrade(url, revision)
    _tell(before, migrations.current(url), as_json)


@command.command(
    "downgrade",
    cls=Command,
    context_settings={"ignore_unknown_options": True},
    examples=(
        ("One revision back; it asks first", "celery -A platform db downgrade"),
        ("To a revision, without asking", "celery -A platform db downgrade 0011 --force"),
        ("Drop all tables, with all jobs", "celery -A platform db downgrade base --force"),
    ),
    codes={Exit.FAILED: "there is no such revision, or you said no"},
)
@click.argument("revision", default="-1")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@click.pass_context
def downgrade(context: click.Context, revision: str, force: bool, as_json: bool) -> None:
    """Take the tables back to REVISION: an id, "-1" for one step (the default), or "base" for none.

    What the later revisions made is dropped, with the jobs in it. It says how many jobs there are, and asks first;
    without a terminal it needs --force.
    """
    url = _url(context)
    before = migrations.current(url)
    if not force:
        loss = f"{_jobs_in(url)} in the tables, and what a later revision made is dropped."
        confirm(f"{loss} Take the tables back from {before} to {revision}?", "--force")
    with command_bar("taking the tables back"):
        migrations.downgrade(url, revision)
    _tell(before, migrations.current(url), as_json)


def _jobs_in(url: str) -> str:
    jobs = migrations.count_jobs(url)
    more = " or more" if jobs == migrations.MAX_COUNTED else ""
    return f"{jobs:,}{more} {'job is' if jobs == 1 else 'jobs are'}"


@command.command(
    "current",
    cls=Command,
    examples=(
        ("The revision, and whether an upgrade is needed", "celery -A platform db current"),
        ("The same for a program", "celery -A platform db current --json"),
    ),
)
@json_option
@click.pass_context
def current(context: click.Context, as_json: bool) -> None:
    """Print the revision of the tables, "none" without tables.

    Says so, on standard error, where an upgrade is needed.
    """
    revision = migrations.current(_url(context))
    if as_json:
        print_json({"current": revision, "head": migrations.HEAD, "up_to_date": revision == migrations.HEAD})
    else:
        facts().print(revision or "none")
    if revision != migrations.HEAD:
        talk().print(f"needed: {migrations.HEAD}; run `celery -A platform db upgrade`")


def _url(context: click.Context) -> str:
    return str(stores_of(context).settings.database_url)


def _tell(before: str | None, after: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"before": before, "current": after, "head": migrations.HEAD})
    elif before == after:
        facts().print(f"the tables are at {after or 'none'} already")
    else:
        facts().print(f"the tables went from {before or 'none'} to {after or 'none'}")
