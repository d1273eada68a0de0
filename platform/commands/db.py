"""`celery -A platform db`: the tables in Postgres."""

from __future__ import annotations

import sys

import click

import migrations
from platform.edge import answering, json_option, stores_of
from platform.terminal import facts, print_json, talk

__all__ = ["command"]


@click.group("db")
def command() -> None:
    """Make, upgrade or look at the tables in Postgres."""


@command.command("upgrade")
@click.argument("revision", default="head")
@json_option
@click.pass_context
def upgrade(context: click.Context, revision: str, as_json: bool) -> None:
    """Bring the tables up to REVISION (default: the newest). Harmless where they are."""
    with answering(as_json):
        url = _url(context)
        before = migrations.current(url)
        migrations.upgrade(url, revision)
        _tell(before, migrations.current(url), as_json)


@command.command("downgrade", context_settings={"ignore_unknown_options": True})
@click.argument("revision", default="-1")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@click.pass_context
def downgrade(context: click.Context, revision: str, force: bool, as_json: bool) -> None:
    """Take the tables back to REVISION: an id, "-1" for one step (the default), or "base" for none.

    What the later revisions made is dropped, with the jobs in it; on a terminal it asks first.
    """
    with answering(as_json):
        url = _url(context)
        before = migrations.current(url)
        if sys.stdin.isatty() and not force:
            click.confirm(
                f"Take the tables back from {before} to {revision}? What is dropped, jobs included, is gone",
                abort=True,
                err=True,
            )
        migrations.downgrade(url, revision)
        _tell(before, migrations.current(url), as_json)


@command.command("current")
@json_option
@click.pass_context
def current(context: click.Context, as_json: bool) -> None:
    """Print the revision of the tables, "none" where there are none; says so where an upgrade is needed."""
    with answering(as_json):
        found = migrations.current(_url(context))
    if as_json:
        print_json({"current": found, "head": migrations.HEAD, "up_to_date": found == migrations.HEAD})
    else:
        facts().print(found or "none", soft_wrap=True)
    if found != migrations.HEAD:
        talk().print(f"needed: {migrations.HEAD}; run `celery -A platform db upgrade`", soft_wrap=True)


def _url(context: click.Context) -> str:
    return str(stores_of(context).settings.database_url)


def _tell(before: str | None, after: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"before": before, "current": after, "head": migrations.HEAD})
    elif before == after:
        facts().print(f"the tables are at {after or 'none'} already", soft_wrap=True)
    else:
        facts().print(f"the tables went from {before or 'none'} to {after or 'none'}", soft_wrap=True)
